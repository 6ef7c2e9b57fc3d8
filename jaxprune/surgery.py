"""Cuts a plan out of a model. The axes table is the whole dependency graph."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.models import LayerDims, LlamaConfig, Params, PerLayer, Probes, Run, axes, probes
from jaxprune.plan import Plan


def pruned_config(cfg: LlamaConfig, plan: Plan) -> LlamaConfig:
    """The configuration of the model after the cut.

    Raises:
      ValueError: the plan is for a model of another shape, or would leave no layer at all.
    """
    plan.check(cfg)

    def narrow(dims: LayerDims, keep: dict) -> LayerDims:
        kv = len(keep["k"]) if "k" in keep else dims.kv_heads
        return LayerDims(kv, dims.q_per_kv if kv else 0, len(keep["f"]) if "f" in keep else dims.ff)

    layers = tuple(narrow(dims, keep) for dims, keep in zip(cfg.layers, plan.keep, strict=True))
    if not any(dims.kv_heads or dims.ff for dims in layers):
        raise ValueError("plan: it removes every layer; keep at least one unit")
    d = len(plan.keep[0]["d"]) if "d" in plan.keep[0] else cfg.d
    if not d:
        raise ValueError("plan: it removes the whole residual stream; keep at least one channel on axis d")
    return dataclasses.replace(cfg, layers=layers, d=d)


def take(x: jax.Array, letters: str, keep: dict) -> jax.Array:
    """The kept positions of one array whose axes are `letters`; axes that `keep` does not name stay whole."""
    for i, axis in enumerate(letters):
        if axis in keep:
            x = jnp.take(x, jnp.asarray(keep[axis]), axis=i)
    return x


def cut(params: Params, cfg: LlamaConfig, plan: Plan) -> tuple[Params, LlamaConfig]:
    """Takes the kept units along every array axis that carries their letter.

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
    return _cut(params, keep, cfg, small), small


@functools.partial(jax.jit, static_argnames=("cfg", "small"))
def _cut(params: Params, keep: PerLayer, cfg: LlamaConfig, small: LlamaConfig) -> Params:
    """One program for the whole model: a gather for each part of an old run that goes into a new run."""
    shared = {"d": keep[0]["d"]} if "d" in keep[0] else {}
    out: Params = {name: take(params[name], letters, shared) for name, letters in cfg.top_arrays().items()}
    for run in small.runs:
        arrays: dict[str, list[jax.Array]] = {}
        for name, start, layers in _parts(cfg, run):
            indices = jax.tree.map(lambda *x: jnp.stack(x), *(keep[i] for i in layers))
            for array, letters in small.layer_arrays(run.dims).items():
                part = params[name][array][start : start + len(layers)]
                mine = {a: x for a, x in indices.items() if a in letters}
                gather = functools.partial(take, letters=letters)
                arrays.setdefault(array, []).append(jax.vmap(lambda x, k, g=gather: g(x, keep=k))(part, mine) if mine else part)
        if arrays:
            out[run.name] = {array: jnp.concatenate(parts) for array, parts in arrays.items()}
    return out


def _parts(cfg: LlamaConfig, run: Run) -> Iterator[tuple[str, int, range]]:
    """The old runs that a new run is made of: name, first position in it, layers."""
    for old in cfg.runs:
        layers = range(max(old.start, run.start), min(old.start + old.length, run.start + run.length))
        if layers:
            yield old.name, layers.start - old.start, layers


def gates_of(plan: Plan, cfg: LlamaConfig) -> Probes:
    """The plan as zeros and ones: `models.apply(params, tokens, cfg, gates_of(plan, cfg))` prunes without cutting.

    Returns:
      `{"gates": PerLayer}` for the axes that the plan names.
    """
    plan.check(cfg)
    units = "".join(a for a in axes.UNITS if any(a in keep for keep in plan.keep))
    full = probes(cfg, units)["gates"]

    def layer(gates: dict, keep: dict) -> dict:
        return {a: jnp.zeros_like(g).at[np.asarray(keep[a])].set(1) if a in keep else g for a, g in gates.items()}

    return {"gates": tuple(layer(g, keep) for g, keep in zip(full, plan.keep, strict=True))}


def widen(small: Params, cfg: LlamaConfig, plan: Plan) -> Params:
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

    def scatter(x, letters: str, keep: dict, size: dict[str, int]):
        index = np.ix_(*(np.asarray(keep[a]) if a in keep else np.arange(size[a]) for a in letters))
        return jnp.zeros([size[a] for a in letters], x.dtype).at[index].set(x)

    shared = {"d": plan.keep[0]["d"]} if "d" in plan.keep[0] else {}
    out = {name: scatter(small[name], letters, shared, cfg.sizes()) for name, letters in cfg.top_arrays().items()}
    for run in cfg.runs:
        arrays: dict[str, list] = {}
        for layer in range(run.start, run.start + run.length):
            name, i = where[layer]
            size = cfg.sizes(run.dims)
            for array, letters in cfg.layer_arrays(run.dims).items():
                kept = small.get(name, {}).get(array)
                wide = (
                    jnp.zeros([size[a] for a in letters], small["embed"].dtype)
                    if kept is None
                    else scatter(kept[i], letters, plan.keep[layer], size)
                )
                arrays.setdefault(array, []).append(wide)
        if arrays:
            out[run.name] = {array: jnp.stack(slices) for array, slices in arrays.items()}
    return out
