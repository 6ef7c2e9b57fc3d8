"""Profile `hf-padded`: layers of any widths, filled up with zeros until all are equal, for readers of plain LLaMA folders."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune.models import checkpoint
from jaxprune.models._runs import places
from jaxprune.models.config import LayerDims, LlamaConfig
from jaxprune.models.export import hf
from jaxprune.models.export._plain import NONE, beyond_padding, kept, sayable, uniform, widest, words
from jaxprune.models.types import Params
from jaxprune.models.units import positions


def problems(cfg: LlamaConfig, dims: LayerDims | None = None) -> list[str]:
    """Why padding does not make this model a plain one; empty if it does.

    Args:
      cfg: the model. A narrower residual stream is no obstacle: it has one width everywhere.
      dims: widths of all layers after padding, e.g. those of the model that was pruned, or None for the smallest.

    Returns:
      One message for each obstacle.

    >>> from jaxprune.models import LayerDims, LlamaConfig
    >>> from jaxprune.models.export import hf_padded
    >>> cfg = LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 40), LayerDims(0, 0, 48)))
    >>> hf_padded.problems(cfg)
    []
    >>> hf_padded.problems(cfg, LayerDims(2, 1, 48))
    ['2 KV heads x 1 query head, 48 channels given; layer 0 has 2 KV heads x 2 query heads, 40 channels: give at least \
2 KV heads x 2 query heads, 48 channels']
    """
    why = beyond_padding(cfg)
    if why or dims is None:
        return why
    for i, have in kept(cfg).items():
        if any(n > m for n, m in zip(have.widths, dims.widths, strict=True)):
            return [f"{words(dims)} given; layer {i} has {words(have)}: give at least {words(widest(cfg))}"]
    if not min(dims.widths) or not sayable(cfg, dims):
        least = uniform(cfg)
        return [f"{words(dims)} given; no class of transformers has such layers: leave it out, or give {words(least or dims)}"]
    return []


def pad(params: Params, cfg: LlamaConfig, dims: LayerDims | None = None) -> tuple[Params, LlamaConfig]:
    """The same function with layers of equal widths: what is added are zeros, and ones in norms that nothing reads.

    A KV head that is added has zeros in k and v, and its query heads in q and o; layers with fewer query heads for each KV head
    get them inside every group, so that the groups stay what they are. A rotary pair that is added has zeros in q, k, v and o.
    A channel that is added has zeros in gate, up and down.
    Layers of which nothing is left stay away: a folder has fewer layers then.

    Args:
      params: the tree of `init`.
      cfg: what `params` was made with.
      dims: widths of all layers afterwards, or None for the smallest.

    Returns:
      Larger params and their configuration. Logits are equal but for the order in which sums are taken.

    Raises:
      ValueError: `problems(cfg, dims)` is not empty.

    >>> import jax
    >>> from jaxprune import models
    >>> from jaxprune.models.export import hf_padded
    >>> layers = (models.LayerDims(2, 2, 40), models.LayerDims(1, 2, 48))
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=layers)
    >>> wide, wide_cfg = hf_padded.pad(models.init(jax.random.key(0), cfg), cfg)
    >>> wide_cfg.layers[1], wide["run_0"]["q"].shape
    (LayerDims(kv_heads=2, q_per_kv=2, ff=48), (2, 32, 2, 2, 8))
    """
    wide_cfg = padded_config(cfg, dims)
    size, where = wide_cfg.sizes(max(wide_cfg.layers)), places(cfg.runs)
    wide = {name: params[name] for name in cfg.top_arrays()}
    for run in wide_cfg.runs:
        arrays = {}
        for name, letters in wide_cfg.layer_arrays(run.dims).items():
            shape = [run.length, *(size[a] for a in letters)]
            out = (np.ones if name.endswith("norm") else np.zeros)(shape, params["embed"].dtype)
            for i in range(run.length):
                old, at = where[run.start + i]
                if name in params[old.name]:
                    x = np.asarray(params[old.name][name][at])
                    pairs = cfg.layers[run.start + i].pairs
                    at_head = slice(None) if pairs is None else positions("h", pairs, cfg.head_dim)
                    out[i][tuple(at_head if a == "h" else slice(n) for a, n in zip(letters, x.shape, strict=True))] = x
            arrays[name] = jnp.asarray(out)
        if arrays:
            wide[run.name] = arrays
    return wide, wide_cfg


def padded_config(cfg: LlamaConfig, dims: LayerDims | None = None) -> LlamaConfig:
    """The configuration that `pad` leads to, with its arguments and errors."""
    hf.refuse("hf-padded", problems(cfg, dims))
    shape = dims or uniform(cfg)
    assert shape is not None, "without problems there is a shape"
    return dataclasses.replace(cfg, layers=tuple(shape if cfg.layer_arrays(own) else NONE for own in cfg.layers))


def write(
    folder: str | Path, params: Params, cfg: LlamaConfig, tokenizer: Any = None, *, dims: LayerDims | None = None
) -> None:
    """Writes the padded model as `jaxprune.models.save` does. It is no smaller than the model that was pruned, nor faster.

    Args:
      folder, params, cfg, tokenizer: as in `save`.
      dims: as in `pad`.

    Raises:
      ValueError: `problems(cfg, dims)` is not empty.
    """
    checkpoint.save(folder, *pad(params, cfg, dims), tokenizer)


def predicted_bytes(cfg: LlamaConfig, dtype: Any, dims: LayerDims | None = None) -> int:
    """Bytes of the tensors in the file.

    Args:
      cfg: the model before padding.
      dtype: of all its parameters.
      dims: as in `pad`.

    Raises:
      ValueError: `problems(cfg, dims)` is not empty.
    """
    return hf.predicted_bytes(padded_config(cfg, dims), dtype)
