"""Cuts a plan out of a model. The axes table is the whole dependency graph."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _beside
from jaxprune.models import Config, LayerDims, LlamaConfig, MambaConfig, Params, Probes, axes, probes, unit_counts
from jaxprune.models._mesh import on_host
from jaxprune.models._runs import places
from jaxprune.models.units import positions
from jaxprune.plan import Plan


def pruned_config(cfg: Config, plan: Plan) -> Any:
    """The configuration of the model after the cut, of the kind of `cfg`.

    Raises:
      ValueError: the plan is for a model of another shape, or would leave no layer at all.
    """
    plan.check(cfg)

    small = cfg.with_widths([{a: len(x) for a, x in keep.items()} for keep in plan.keep])
    if isinstance(small, LlamaConfig) and any("h" in keep for keep in plan.keep):
        small = dataclasses.replace(small, layers=tuple(map(_with_pairs, small.layers, plan.keep, plan.sizes)))
    if not any(unit_counts(small)):
        raise ValueError("plan: it removes every layer; keep at least one unit")
    d = len(plan.keep[0]["d"]) if "d" in plan.keep[0] else cfg.d
    if not d:
        raise ValueError("plan: it removes the whole residual stream; keep at least one channel on axis d")
    if isinstance(small, MambaConfig) and d != cfg.d:
        raise ValueError("plan: axis d given for a Mamba, whose residual channels cannot go; cut its inner channels, axis i")
    return dataclasses.replace(small, d=d)


def _with_pairs(dims: LayerDims, keep: dict, sizes: dict[str, int]) -> LayerDims:
    """The widths of a layer, of whose rotary pairs `keep` names those that stay; without any its attention is gone."""
    if "h" not in keep or len(keep["h"]) == sizes["h"]:
        return dims
    if not len(keep["h"]) or not dims.kv_heads:
        return dims._replace(kv_heads=0, q_per_kv=0, pairs=None)
    have = range(sizes["h"]) if dims.pairs is None else dims.pairs
    return dims._replace(pairs=tuple(have[i] for i in keep["h"]))


def take(x: np.ndarray | jax.Array, letters: str, keep: dict) -> np.ndarray:
    """The kept positions of one array whose axes are `letters`, on the host; axes that `keep` does not name stay whole."""
    x = on_host(x)
    for i, axis in enumerate(letters):
        if axis in keep:
            x = np.take(x, positions(axis, keep[axis], x.shape[i]), axis=i)
    return x


def cut(params: Params, cfg: Config, plan: Plan) -> tuple[Params, Any]:
    """Takes the kept units along every array axis that carries their letter.

    The work is done on the host: on a device each of its many shapes would be a program to compile. What comes out lies on the
    mesh that `params` lie on, see `jaxprune.sharding`.

    Args:
      params: the tree of `models.shapes(cfg)`.
      cfg: the model.
      plan: what to keep.

    Returns:
      Smaller params and their configuration. Layers of equal widths are stacked into new runs. The identity plan returns the
      same bits.

    Raises:
      ValueError: the plan is for a model of another shape, or would leave nothing.

    >>> import jax
    >>> from jaxprune import models, plan, surgery
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> keep = plan.Plan(({"k": [1], "f": range(40)},), models.unit_counts(cfg))
    >>> small, cfg = surgery.cut(models.init(jax.random.key(0), cfg), cfg, keep)
    >>> small["run_0"]["o"].shape, cfg.layers[0]
    ((1, 1, 2, 8, 32), LayerDims(kv_heads=1, q_per_kv=2, ff=40))
    """
    small = pruned_config(cfg, plan)
    keep = tuple({a: x for a, x in k.items() if len(x) < n[a]} for k, n in zip(plan.keep, plan.sizes, strict=True))
    shared = {"d": keep[0]["d"]} if "d" in keep[0] else {}
    put = _beside.like(params, small)
    out: Params = {}
    for name, letters in small.top_arrays().items():
        out[name] = put((name,), take(params[name], letters, shared)) if set(letters) & set(shared) else params[name]
    where = places(cfg.runs)
    for run in small.runs:
        layers = range(run.start, run.start + run.length)
        old = where[run.start][0]
        arrays = {}
        for array, letters in small.layer_arrays(run.dims).items():
            if old == run._replace(name=old.name, dims=old.dims) and not any(set(letters) & set(keep[i]) for i in layers):
                arrays[array] = params[old.name][array]  # the whole run as it is
                continue
            dtype = params[old.name][array].dtype
            wide = np.empty([run.length, *(small.sizes(run.dims)[a] for a in letters)], dtype)
            for j, i in enumerate(layers):
                source, at = where[i]
                wide[j] = take(on_host(params[source.name][array], at), letters, keep[i])
            arrays[array] = put((run.name, array), wide)
        if arrays:
            out[run.name] = arrays
    return out, small


def gates_of(plan: Plan, cfg: Config) -> Probes:
    """The plan as zeros and ones: `models.apply(params, tokens, cfg, gates_of(plan, cfg))` prunes without cutting.

    Returns:
      `{"gates": PerLayer}` for the axes that the plan names.
    """
    plan.check(cfg)
    units = "".join(a for a in axes.UNITS if any(a in keep for keep in plan.keep))
    full = probes(cfg, units)["gates"]

    def layer(gates: dict, keep: dict) -> dict:
        return {a: _ones_at(keep[a], len(g)) if a in keep else g for a, g in gates.items()}

    return {"gates": tuple(layer(g, keep) for g, keep in zip(full, plan.keep, strict=True))}


def _ones_at(units: Any, n: int) -> jax.Array:
    gate = np.zeros(n, np.float32)
    gate[np.asarray(units, np.int64)] = 1
    return jnp.asarray(gate)


def widen(small: Params, cfg: Config, plan: Plan) -> Params:
    """Scatters the arrays of a cut model into the shapes of the model that it was cut from, zeros elsewhere.

    Args:
      small: params of `pruned_config(cfg, plan)`.
      cfg: the model before the cut, with the biases that `small` has.
      plan: what was kept.

    Returns:
      Params of `cfg`: `cut(widen(small, cfg, plan), cfg, plan)` is `small`.
    """
    pruned = pruned_config(cfg, plan)
    where = {run.start + i: (run.name, i) for run in pruned.runs for i in range(run.length)}

    def scatter(x, letters: str, keep: dict, size: dict[str, int]) -> np.ndarray:
        wide = np.zeros([size[a] for a in letters], small["embed"].dtype if x is None else x.dtype)
        if x is not None:
            x = on_host(x)
            index = (positions(a, keep[a], size[a]) if a in keep else np.arange(size[a]) for a in letters)
            wide[np.ix_(*index)] = x
        return wide

    shared = {"d": plan.keep[0]["d"]} if "d" in plan.keep[0] else {}
    put = _beside.like(small, cfg)
    out: Params = {}
    for name, letters in cfg.top_arrays().items():
        narrow = set(letters) & set(shared)
        out[name] = put((name,), scatter(small[name], letters, shared, cfg.sizes())) if narrow else small[name]
    for run in cfg.runs:
        arrays: dict[str, list] = {}
        for layer in range(run.start, run.start + run.length):
            name, i = where[layer]
            for array, letters in cfg.layer_arrays(run.dims).items():
                kept = small.get(name, {}).get(array)
                kept = None if kept is None else on_host(kept, i)
                arrays.setdefault(array, []).append(scatter(kept, letters, plan.keep[layer], cfg.sizes(run.dims)))
        if arrays:
            out[run.name] = {array: put((run.name, array), np.stack(slices)) for array, slices in arrays.items()}
    return out
