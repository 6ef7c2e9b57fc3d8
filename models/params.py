"""The parameter tree of a configuration, and the probes of its units."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.models import axes
from jaxprune.models._mamba_init import initial
from jaxprune.models.config import LlamaConfig
from jaxprune.models.mamba_config import MambaConfig
from jaxprune.models.types import Config, Params, Probes
from jaxprune.models.units import unit_sizes


def shapes(cfg: Config, dtype: Any = jnp.float32) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s: `embed`, `norm`, `head` unless tied, one dict of stacked arrays a run."""

    def arrays(table: dict[str, str], size: dict[str, int], lead: tuple[int, ...] = ()) -> dict:
        return {n: jax.ShapeDtypeStruct((*lead, *(size[a] for a in ax)), dtype) for n, ax in table.items()}

    runs = {run.name: arrays(cfg.layer_arrays(run.dims), cfg.sizes(run.dims), (run.length,)) for run in cfg.runs}
    return arrays(cfg.top_arrays(), cfg.sizes()) | {name: run for name, run in runs.items() if run}


def init(key: jax.Array, cfg: Config, dtype: Any = jnp.float32) -> Params:
    """Random parameters: gains of norms one, biases zero, shortcuts the identity, matrices normal with standard deviation 0.02.

    What else Mamba has starts as in `jaxprune.models._mamba_init`.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes(cfg, dtype))
    ends = np.cumsum([leaf.size for _, leaf in leaves])
    flat = np.asarray(0.02 * jax.random.normal(key, (int(ends[-1]),)))  # one draw: XLA compiles random bits slowly

    def one(path, leaf, end):
        name = path[-1].key
        drawn = flat[end - leaf.size : end].reshape(leaf.shape)
        if isinstance(cfg, MambaConfig) and (own := initial(name, drawn / 0.02, cfg)) is not None:
            return jnp.asarray(own, leaf.dtype)
        if name.endswith("norm"):
            return jnp.full(leaf.shape, 0 if isinstance(cfg, LlamaConfig) and cfg.norm_offset else 1, leaf.dtype)
        if name.endswith("_bias"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        if name in axes.SHORTCUTS:
            return jnp.broadcast_to(jnp.eye(cfg.d, dtype=leaf.dtype), leaf.shape)
        return jnp.asarray(drawn, leaf.dtype)

    return jax.tree.unflatten(tree, [one(path, leaf, end) for (path, leaf), end in zip(leaves, ends, strict=True)])


def count_parameters(cfg: Config) -> int:
    """All stored parameters; tied embeddings count once.

    >>> from jaxprune.models import LayerDims, LlamaConfig, count_parameters
    >>> count_parameters(LlamaConfig(vocab=32000, d=4096, head_dim=128, layers=(LayerDims(32, 1, 11008),) * 32))
    6738415616
    """
    return sum(x.size for x in jax.tree.leaves(shapes(cfg)))


def probes(cfg: Config, units: str | None = None, layers: range | None = None) -> Probes:
    """Templates of all probes of the model: gates of one, taps and outputs of zero.

    Args:
      cfg: the model.
      units: axis letters that gates are made for, or None for all that layers may differ in, for which taps exist: `k` and
        `f`, of Mamba `i`.
      layers: those that have probes, or None for all.

    Returns:
      `{"gates": PerLayer of float32[units], "taps": PerLayer of {tensor: float32[unit, ..., channel]}, "output": PerLayer of
      float32[d, d], "inputs": PerLayer of float32[unit, ...]}`; `inputs` are no probes but the shapes that output projections
      read. A layer whose sublayer is gone has no probes for it.

    >>> from jaxprune.models import LayerDims, LlamaConfig, probes
    >>> p = probes(LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 3, 48),)))
    >>> p["gates"][0]["k"].shape, p["taps"][0]["k"]["q"].shape, p["taps"][0]["f"]["down"].shape
    ((2,), (2, 3, 8), (48,))
    """
    square = jnp.zeros((cfg.d, cfg.d), jnp.float32)  # one array for all layers: nothing is written to templates

    def layer(dims: Any) -> tuple[dict, dict, dict, dict]:
        size, arrays, counts = cfg.sizes(dims), cfg.layer_arrays(dims), unit_sizes(cfg, dims)
        alive = [u for u in (cfg.units if units is None else units) if counts[u]]
        gates = {u: jnp.ones(counts[u], jnp.float32) for u in alive}
        taps = {
            u: {
                n: jnp.zeros([size[a] for a in axes.UNITS[u] if a in arrays[n]], jnp.float32)
                for n in cfg.matrices
                if n in arrays and u in arrays[n]
            }
            for u in alive
            if u in cfg.units
        }
        output = dict.fromkeys(taps, square)
        return gates, taps, output, {u: jnp.zeros([size[a] for a in axes.UNITS[u]], jnp.float32) for u in taps}

    mine = range(len(cfg.layers)) if layers is None else layers
    each = [layer(dims) if i in mine else ({}, {}, {}, {}) for i, dims in enumerate(cfg.layers)]
    gates, taps, output, inputs = zip(*each, strict=True)
    return dict(gates=gates, taps=taps, output=output, inputs=inputs)
