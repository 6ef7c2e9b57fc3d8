"""Units of a model: their statistics and their cost."""

import math
from typing import Any

import numpy as np

from jaxprune.models import axes
from jaxprune.models._taps import reduce_onto
from jaxprune.models.types import Config, Params, PerLayer


def sum_over_units(tree: Params, cfg: Config, units: str | None = None) -> PerLayer:
    """Sums an element-wise statistic, shaped like params, over everything but the units and their channels.

    Args:
      tree: shaped like the params of `cfg`.
      cfg: the model.
      units: axis letters, or None for those that layers may differ in. For `d` the matrices, norms and embeddings count: the
        embedding stands with the first layer, the final norm and the head with the last. Norms with `norm_offset` do not
        count: their arrays are not what the stream is multiplied by.

    Returns:
      Per layer, axis letter -> tensor name -> float32[unit, ..., channel].

    >>> import jax
    >>> from jaxprune import models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 3, 48),))
    >>> s = models.sum_over_units(models.init(jax.random.key(0), cfg), cfg)
    >>> s[0]["k"]["o"].shape, s[0]["f"]["gate"].shape
    ((2, 3, 8), (48,))
    """
    units = cfg.units if units is None else units
    norms = not getattr(cfg, "norm_offset", False)
    per_layer: list[dict] = []
    for run in cfg.runs:
        arrays, size = tree.get(run.name, {}), cfg.sizes(run.dims)
        for i in range(run.length):
            counted = {
                n: x[i] for n, x in arrays.items() if n in cfg.matrices or ("d" in units and norms and n.endswith("norm"))
            }
            per_layer.append(
                {
                    u: {n: reduce_onto(x, axes.LAYER[n], axes.UNITS[u]) for n, x in counted.items() if u in axes.LAYER[n]}
                    for u in units
                    if size[u]
                }
            )
    if "d" in units:
        for name, letters in cfg.top_arrays().items():
            if name == "norm" and not norms:
                continue
            where = per_layer[0 if name == "embed" else -1]["d"]
            where[f"top/{name}"] = reduce_onto(tree[name], letters, "d")
    return tuple(per_layer)


def unit_costs(cfg: Config) -> PerLayer:
    """Parameters of the matrices that go with one unit, per layer and axis letter (`k` and `f`, of Mamba `i`).

    >>> from jaxprune import models
    >>> models.unit_costs(models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 3, 48),)))
    ({'k': 2048, 'f': 96},)
    """
    out = []
    for dims in cfg.layers:
        size = cfg.sizes(dims)
        letters = [(u, axes.LAYER[n]) for u in cfg.units for n in cfg.matrices if size[u] and u in axes.LAYER[n]]
        costs = dict.fromkeys([u for u, _ in letters], 0)
        for u, ax in letters:
            costs[u] += math.prod(size[a] for a in ax if a != u)
        out.append(costs)
    return tuple(out)


def unit_sizes(cfg: Config, dims: Any) -> dict[str, int]:
    """Axis letter -> units of a layer with these widths: as `cfg.sizes`, but units of `h` are rotary pairs of an attention."""
    size = cfg.sizes(dims)
    return size | dict(h=size["h"] // 2 if size["k"] else 0) if "h" in size else size


def positions(axis: str, kept: Any, n: int) -> np.ndarray:
    """Where the units `kept` of an axis lie in an array that has `n` positions along it: a rotary pair has two.

    >>> from jaxprune.models.units import positions
    >>> positions("h", [0, 3], 8)
    array([0, 3, 4, 7])
    """
    kept = np.asarray(kept, np.int64)
    return np.concatenate([kept, kept + n // 2]) if axis == "h" else kept


def unit_counts(cfg: Config, units: str | None = None) -> PerLayer:
    """Number of units, per layer and axis letter, of sublayers that exist.

    Args:
      cfg: the model.
      units: axis letters, or None for those that layers may differ in.

    >>> from jaxprune import models
    >>> models.unit_counts(models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 3, 48),)))
    ({'k': 2, 'f': 48},)
    """
    letters = cfg.units if units is None else units
    return tuple({u: n for u in letters if (n := unit_sizes(cfg, dims).get(u, 0))} for dims in cfg.layers)
