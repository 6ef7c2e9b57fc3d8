"""Reconstruction: closed-form compensation for pruned units, one layer after the other."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxprune.models import LlamaConfig, Params, PerLayer, Run, axes, embedded, layer_of, project, reads, sublayer
from jaxprune.models._kinds import PAIRS
from jaxprune.models._mesh import by_sequence, on_host
from jaxprune.models._runs import places
from jaxprune.models.axes import OUTPUT
from jaxprune.models.units import positions
from jaxprune.recovery.least_squares import admm, least_squares_to

TARGETS = ("dense", "weights", "residual", "admm", "bias")
RIDGE, CORRECTION = 6e-2, (1.0, 0.2)  # of `residual`
SHAPES = 12  # widths that programs are compiled for, at most


def reconstruct(
    params: Params,
    cfg: LlamaConfig,
    keep: PerLayer,
    batches: Sequence[Any],
    *,
    target: str = "residual",
    damp: float | None = None,
    correction: float | tuple[float, float] = CORRECTION,
    progress: Callable[[Sequence[Any], str], Iterable[Any]] | None = None,
) -> tuple[Params, LlamaConfig]:
    r"""Re-fits the output projections of pruned layers to what is left of their inputs.

    Each pruned attention and MLP is one masked least-squares problem over the calibration tokens. `target` says what it should
    reproduce, from which inputs:

    ==========  ==================================  =========================================================
    target      inputs                              the kept units should add
    ==========  ==================================  =========================================================
    `dense`     of the dense model                  what all units of the dense model add
    `weights`   after the layers before are pruned  what all units would add to the same inputs
    `residual`  after the layers before are pruned  what brings the residual stream back towards the dense model's
    `admm`      of the dense model                  as `dense`, by 30 alternating directions instead of exactly
    `bias`      of the dense model                  its mean is added as a bias, the weights stay
    ==========  ==================================  =========================================================

    Args:
      params, cfg: the dense model.
      keep: per layer, axis letter (`k`, `h`, `f`) -> sorted indices of the units that stay; absent letters keep everything.
      batches: int32[b, t] arrays of calibration tokens of one shape.
      target: see above.
      damp: ridge towards the dense weights, in means of the diagonal of the kept inputs' second moment; `admm` has none. None
        is 0.06 of `residual` and 0.01 of the others.
      correction: of `residual`, the part of what the layers before changed that the kept units should take back, or that
        of the first and of the last layer, linear in between. 1 aims at the dense residual stream, 0 is `weights`. Less than 1
        fits the calibration text less closely and other text better, most of all in the last layers.
      progress: wraps the sequence of layers; called with it and a description.

    Returns:
      Params in the dense shapes, with zeros where nothing is kept, and their configuration, which has biases on `o` and `down`
      after `bias`. What is not pruned keeps its bits; layers before the first pruned one are not touched.

    Raises:
      ValueError: unknown target, one that the model does not allow, no batches, or statistics that are not finite.

    Reference: `dense` and `weights` are the compensation of Shen et al., `Numerical Pruning <https://arxiv.org/abs/2412.12441>`_,
    2024, theorem 3; `admm` is the reformation of Shen et al., `Search for Efficient Large Language Models
    <https://arxiv.org/abs/2409.17372>`_, 2024, theorem 3.1, of which `dense` is the exact form; `bias` is that of An et al.,
    `FLAP <https://arxiv.org/abs/2312.11983>`_, 2024, equation 4. `residual` is ours.

    >>> import jax
    >>> from jaxprune import models, recovery
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 2)
    >>> params, tokens = models.init(jax.random.key(0), cfg), jax.random.randint(jax.random.key(1), (4, 16), 0, 64)
    >>> fitted, _ = recovery.reconstruct(params, cfg, ({}, {"f": range(40)}), [tokens])
    >>> bool((fitted["run_0"]["down"][1, 40:] == 0).all()), bool((fitted["run_0"]["o"] == params["run_0"]["o"]).all())
    (True, True)
    """
    check_target(cfg, target)
    if not all(0 <= part <= 1 for part in np.ravel(correction)):
        raise ValueError(f"correction: {correction} given; allowed is 0 to 1")
    damp = (RIDGE if target == "residual" else 1e-2) if damp is None else damp
    if not batches:
        raise ValueError("batches: none given; reconstruction needs at least one batch of calibration tokens")
    new_cfg = _with_biases(cfg) if target == "bias" else cfg
    out = {run.name: _writable(params, run, new_cfg) for run in cfg.runs}
    dense = [embedded(params, jnp.asarray(b), cfg) for b in batches]
    pruned = dense  # the same list until the two streams part
    where = places(cfg.runs)
    first, last = np.broadcast_to(correction, 2)
    corrections = np.linspace(first, last, len(where)).astype(np.float32)
    for layer in range(len(where)) if progress is None else progress(range(len(where)), "reconstructing"):
        run, i = where[layer]
        name, dims, p = run.name, run.dims, layer_of(params, run, i)
        for axis in "kf":
            n = cfg.sizes(dims)[axis]
            kept = np.asarray(keep[layer].get(axis, range(n)), np.int64)
            pairs = _pairs(p, keep[layer]) if axis == "k" and n else None
            if pairs is not None and not len(pairs):
                kept = pairs
            if len(kept) == n and pairs is None:
                for stream in (dense,) if pruned is dense else (dense, pruned):
                    _advance(p, axis, stream, cfg)
                continue
            if pruned is dense and target in ("weights", "residual"):
                pruned = list(dense)
            whole = target == "admm"
            part = _part(p, axis, np.arange(n) if whole else kept, cfg.layer_arrays(dims), None if whole else pairs)
            sums = _sums(p, part, axis, dense, pruned, target, corrections[layer], cfg)
            stays = _stays(p, axis, kept, pairs)
            if target == "bias":
                fitted = _bias(p, axis, stays, sums)
            else:
                fitted = _admm(p, axis, stays, sums) if whole else _fit(p, axis, stays, sums, damp)
            for array, x in fitted.items():
                out[name][array][i] = x
            if pruned is not dense:
                _advance(_with(part, OUTPUT[axis], fitted[OUTPUT[axis]]), axis, pruned, cfg)
    new = {name: params.get(name, {}) | _placed(arrays, params.get(name, {})) for name, arrays in out.items() if arrays}
    return params | new, new_cfg


def check_target(cfg: LlamaConfig, target: str) -> None:
    """Raises ValueError unless `reconstruct` knows the target and can fit it to a model of this configuration."""
    if target not in TARGETS:
        raise ValueError(f"target: {target!r} given; allowed are {', '.join(TARGETS)}")
    if cfg.post_norms and target in ("residual", "bias"):
        raise ValueError(
            f"reconstruct: {target} given, but this model normalises what its sublayers add (family {cfg.family}), so no "
            "weights bring that nearer in closed form; allowed are dense, weights and none"
        )


def _writable(params: Params, run: Run, cfg: LlamaConfig) -> dict[str, np.ndarray]:
    """Copies of the arrays of a run that may change, zeros for biases that are new."""
    old, letters = params.get(run.name, {}), cfg.layer_arrays(run.dims)
    names = [n for n in ("o", "down", "o_bias", "down_bias") if n in letters]
    dtype = params["embed"].dtype
    shapes = {n: [run.length, *(cfg.sizes(run.dims)[a] for a in letters[n])] for n in names}
    return {n: np.array(on_host(old[n])) if n in old else np.zeros(shapes[n], dtype) for n in names}


def _placed(arrays: dict[str, np.ndarray], old: dict[str, Any]) -> dict[str, Any]:
    """Arrays where the old ones of their names lie, if those lie on a mesh."""
    homes = {n: x.sharding for n, x in old.items() if isinstance(getattr(x, "sharding", None), NamedSharding)}
    return {n: jax.device_put(x, homes[n]) if n in homes else jnp.asarray(x) for n, x in arrays.items()}


def _with_biases(cfg: LlamaConfig) -> LlamaConfig:
    biases = tuple(n for n in axes.MATRICES if n in cfg.biases or n in OUTPUT.values())
    return dataclasses.replace(cfg, biases=biases)


class _Part(NamedTuple):
    """A layer with the kept units of one sublayer alone, and after them some again, so that few shapes are compiled.

    On the host, as is all that has the shape of what is kept: every such operation of its own would be compiled, too.
    """

    arrays: dict[str, Any]
    units: np.ndarray
    kept: int
    head: np.ndarray | None  # dimensions of a head that are left, or None for all


def _pairs(p: dict, keep: dict) -> np.ndarray | None:
    """Rotary pairs of an attention that stay, or None for all."""
    kept = np.asarray(keep.get("h", range(p["o"].shape[2] // 2)), np.int64)
    return None if 2 * len(kept) == p["o"].shape[2] else kept


def _part(p: dict, axis: str, kept: np.ndarray, letters: dict[str, str], pairs: np.ndarray | None) -> _Part:
    if not len(kept):
        return _Part({n: x for n, x in p.items() if axis not in letters.get(n, "")}, kept, 0, None)
    n = p[OUTPUT[axis]].shape[0]
    again = min(-len(kept) % -(-n // SHAPES), n - len(kept))
    index = np.concatenate([kept, np.zeros(again, np.int64)])
    taken = {n: np.take(on_host(x), index, letters[n].index(axis)) if axis in letters.get(n, "") else x for n, x in p.items()}
    if pairs is None:
        return _Part(taken, index, len(kept), None)
    head = positions("h", pairs, p["o"].shape[2])
    taken = {n: np.take(on_host(x), head, letters[n].index("h")) if "h" in letters.get(n, "") else x for n, x in taken.items()}
    had = np.asarray(p.get(PAIRS, range(p["o"].shape[2] // 2)))
    return _Part(taken | {PAIRS: had[pairs]}, index, len(kept), head)


def _stays(p: dict, axis: str, kept: np.ndarray, pairs: np.ndarray | None) -> np.ndarray:
    """Which inputs of the output projection stay, bool[units...]."""
    shape = p[OUTPUT[axis]].shape[:-1]
    stays = np.zeros(shape, bool)
    stays[kept] = True
    if pairs is not None:
        stays &= np.isin(np.arange(shape[2]), positions("h", pairs, shape[2]))
    return stays


def _with(part: _Part, name: str, w: np.ndarray) -> dict:
    """The arrays of a part whose output projection is that of `w`; units that are there again add nothing."""
    if not part.kept:
        return part.arrays
    rows = w[part.units] if part.head is None else w[part.units][:, :, part.head]
    rows[part.kept :] = 0
    return part.arrays | {name: rows}


def _advance(p: dict, axis: str, stream: list, cfg: LlamaConfig) -> None:
    """Takes every batch of a residual stream through a sublayer, in place."""
    for i, x in enumerate(stream):
        stream[i] = _after(p, axis, x, cfg)


@functools.partial(jax.jit, static_argnames=("axis", "cfg"))
def _after(p, axis, x, cfg):
    return sublayer(p, OUTPUT[axis], by_sequence(x), cfg)


class Sums(NamedTuple):
    """Over tokens: x x^T of what a part reads and y x^T of what it should add; or x of all units, and how many."""

    gram: Any = None
    target: Any = None
    total: Any = None
    tokens: Any = None


def _sums(p, part: _Part, axis, dense: list, pruned: list, target: str, correction: np.float32, cfg) -> Sums:
    """The sums of a sublayer over all batches; takes the dense model's residual stream through it, in place."""
    inputs = int(np.prod(p[OUTPUT[axis]].shape[:-1]))
    width = int(np.prod(part.arrays[OUTPUT[axis]].shape[:-1])) if part.kept else 0
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    if target == "bias":
        sums = Sums(total=zeros(inputs), tokens=zeros(()))
    else:
        sums = Sums(zeros((width, width)), zeros((cfg.d, width)))
    for i, (d, x) in enumerate(zip(dense, pruned, strict=True)):
        dense[i], sums = add_sums(p, part.arrays, part.units, part.head, axis, d, x, sums, target, correction, cfg)
    return sums


@functools.partial(jax.jit, static_argnames=("axis", "cfg", "target"), donate_argnames="sums")
def add_sums(p, kept, index, head, axis, dense, pruned, sums: Sums, target, correction, cfg):
    """The dense model's residual stream after a sublayer, and the sums with one more batch."""
    name, dense, pruned = OUTPUT[axis], by_sequence(dense), by_sequence(pruned)
    z = reads(p, name, dense, cfg)
    after = project(p, name, dense, z, cfg, {})

    def adds(z: jax.Array) -> jax.Array:
        return project({name: p[name]}, name, jnp.zeros_like(dense), z, cfg, {})

    if target == "bias":
        rows = _rows(z)
        return after, sums._replace(total=sums.total + rows.sum(0), tokens=sums.tokens + len(rows))
    if not len(index):
        return after, sums
    if target == "residual":
        x = reads(kept, name, pruned, cfg)
        start = project(p, name, pruned, None, cfg, {})  # through the shortcut, with the bias
        back = after.astype(jnp.float32) - start.astype(jnp.float32)
        y = correction * back + (1 - correction) * adds(reads(p, name, pruned, cfg)).astype(jnp.float32)
    else:
        z = z if target == "dense" else reads(p, name, pruned, cfg)
        x, y = jnp.take(z, index, axis=2), adds(z)
        x = x if head is None else jnp.take(x, head, axis=4)
    rows, wanted = _rows(x), _rows(y)
    gram, target_sum = (jnp.matmul(a.T, rows, precision="highest") for a in (rows, wanted))
    return after, sums._replace(gram=sums.gram + gram, target=sums.target + target_sum)


def _rows(x: jax.Array) -> jax.Array:
    """float32[tokens, features]."""
    return x.reshape(-1, int(np.prod(x.shape[2:]))).astype(jnp.float32)


def _fit(p: dict, axis: str, stays: np.ndarray, sums: Sums, damp: float) -> dict:
    """The new output projection of a sublayer, zero where nothing `stays`."""
    w = on_host(p[OUTPUT[axis]])
    old = w[stays].astype(np.float32).T  # out, in
    n = old.shape[1]
    gram, target = on_host(sums.gram)[:n, :n], on_host(sums.target)[:, :n]
    new = np.zeros_like(w)
    new[stays] = least_squares_to(target, gram, old, np.arange(n), damp).T
    return {OUTPUT[axis]: new}


def _admm(p: dict, axis: str, stays: np.ndarray, sums: Sums) -> dict:
    """The same by alternating directions, from the sums of all units."""
    w = on_host(p[OUTPUT[axis]])
    rows = w.astype(np.float32).reshape(-1, w.shape[-1]).T  # out, in
    return {OUTPUT[axis]: admm(rows, on_host(sums.gram), stays.reshape(-1)).T.reshape(w.shape).astype(w.dtype)}


def _bias(p: dict, axis: str, stays: np.ndarray, sums: Sums) -> dict:
    """The output projection with zeros for inputs that go, and the bias that adds their mean."""
    name = OUTPUT[axis]
    w = on_host(p[name])
    mean = on_host(sums.total / sums.tokens).astype(np.float64).reshape(w.shape[:-1])
    bias = mean[~stays] @ w[~stays].astype(np.float64)
    bias = bias + on_host(p[f"{name}_bias"]).astype(np.float64) if f"{name}_bias" in p else bias
    return {name: np.where(stays[..., None], w, 0).astype(w.dtype), f"{name}_bias": bias.astype(w.dtype)}
