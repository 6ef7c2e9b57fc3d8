"""Reconstruction: closed-form compensation for pruned units, one layer after the other."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.models import LlamaConfig, Params, PerLayer, axes, project, reads
from jaxprune.recovery.least_squares import least_squares_to, masked_least_squares

TARGETS = ("dense", "weights", "residual", "bias")
OUT = dict(k="o", f="down")


class _Sums(NamedTuple):
    """Over tokens: x x^T of what a projection reads, y x^T of what it should add, x, and how many tokens."""

    gram: Any
    target: Any
    total: Any
    tokens: Any


def reconstruct(
    params: Params,
    cfg: LlamaConfig,
    keep: PerLayer,
    batches: Sequence[Any],
    *,
    target: str = "residual",
    damp: float = 1e-2,
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
    `residual`  after the layers before are pruned  what brings the residual stream back to the dense model's
    `bias`      of the dense model                  its mean is added as a bias, the weights stay
    ==========  ==================================  =========================================================

    Args:
      params, cfg: the dense model.
      keep: per layer, axis letter (`k`, `f`) -> sorted indices of the units that stay; absent letters keep everything.
      batches: int32[b, t] arrays of calibration tokens of one shape.
      target: see above.
      damp: ridge towards the dense weights, in means of the diagonal of the inputs' second moment.
      progress: wraps the sequence of layers; called with it and a description.

    Returns:
      Params in the dense shapes, with zeros where nothing is kept, and their configuration, which has biases on `o` and `down`
      after `bias`. What is not pruned keeps its bits; layers before the first pruned one are not touched.

    Raises:
      ValueError: unknown target, no batches, or statistics that are not finite.

    Reference: `dense` and `weights` are the compensation of Shen et al., `Numerical Pruning <https://arxiv.org/abs/2412.12441>`_,
    2024, theorem 3, and the reformation of `Search for Efficient LLMs <https://arxiv.org/abs/2409.17372>`_; `bias` is that of
    An et al., `FLAP <https://arxiv.org/abs/2312.11983>`_, 2024, equation 4. `residual` is ours.

    >>> import jax
    >>> from jaxprune import models, recovery
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 2)
    >>> params, tokens = models.init(jax.random.key(0), cfg), jax.random.randint(jax.random.key(1), (4, 16), 0, 64)
    >>> fitted, _ = recovery.reconstruct(params, cfg, ({}, {"f": range(40)}), [tokens])
    >>> bool((fitted["run_0"]["down"][1, 40:] == 0).all()), bool((fitted["run_0"]["o"] == params["run_0"]["o"]).all())
    (True, True)
    """
    if target not in TARGETS:
        raise ValueError(f"target: {target!r} given; allowed are {', '.join(TARGETS)}")
    if not batches:
        raise ValueError("batches: none given; reconstruction needs at least one batch of calibration tokens")
    new_cfg = _with_biases(cfg) if target == "bias" else cfg
    out: dict[str, dict[str, list]] = {run.name: {} for run in cfg.runs}
    dense = [params["embed"][jnp.asarray(b)] for b in batches]
    pruned = dense
    where = [(run.name, i, run.dims) for run in cfg.runs for i in range(run.length)]
    for layer in range(len(where)) if progress is None else progress(range(len(where)), "reconstructing"):
        name, i, dims = where[layer]
        p = {n: x[i] for n, x in params.get(name, {}).items()}
        new = dict(p)
        for axis in "kf":
            if (n := cfg.sizes(dims)[axis]) == 0:
                continue
            kept = np.asarray(keep[layer].get(axis, range(n)), np.int64)
            sums, next_dense = _sums(p, axis, dense, pruned, target, len(kept) < n, cfg)
            if len(kept) < n:
                new |= _fitted(p, axis, kept, sums, target, damp, cfg)
            follow = target in ("weights", "residual") and (pruned is not dense or len(kept) < n)
            pruned = [_after(new, axis, x, cfg) for x in pruned] if follow else next_dense
            dense = next_dense
        for array, letters in new_cfg.layer_arrays(dims).items():
            x = new.get(array, jnp.zeros([new_cfg.sizes(dims)[a] for a in letters], params["embed"].dtype))
            out[name].setdefault(array, []).append(x)
    fitted = params | {name: {n: jnp.stack(x) for n, x in arrays.items()} for name, arrays in out.items() if arrays}
    return fitted, new_cfg


def _with_biases(cfg: LlamaConfig) -> LlamaConfig:
    biases = tuple(n for n in axes.MATRICES if n in cfg.biases or n in OUT.values())
    return dataclasses.replace(cfg, biases=biases)


@functools.partial(jax.jit, static_argnames=("axis", "cfg"))
def _after(p, axis, x, cfg):
    return project(p, OUT[axis], x, reads(p, OUT[axis], x, cfg), {})


@functools.partial(jax.jit, static_argnames=("axis", "cfg", "target"), donate_argnames="sums")
def _step(p, axis, dense, pruned, sums, target, cfg):
    """The residual stream of the dense model after a sublayer, and the sums with one more batch; either may be left out."""
    z = reads(p, OUT[axis], dense, cfg)
    after = project(p, OUT[axis], dense, z, {})
    if sums is None:
        return after, None
    if pruned is not None and target in ("weights", "residual"):
        z = reads(p, OUT[axis], pruned, cfg)
    rows = z.reshape(-1, int(np.prod(z.shape[2:]))).astype(jnp.float32)
    total, tokens = sums.total + rows.sum(0), sums.tokens + len(rows)
    if target == "bias":
        return after, _Sums(None, None, total, tokens)
    gram = sums.gram + jnp.matmul(rows.T, rows, precision="highest")
    wanted = sums.target
    if target == "residual":
        start = dense if pruned is None else pruned
        start = project(p, OUT[axis], start, None, {})  # through the shortcut, with the bias
        y = (after.astype(jnp.float32) - start.astype(jnp.float32)).reshape(len(rows), -1)
        wanted = wanted + jnp.matmul(y.T, rows, precision="highest")
    return after, _Sums(gram, wanted, total, tokens)


def _sums(p, axis, dense, pruned, target, needed, cfg):
    """Runs a sublayer over all batches: its sums, if they are needed, and the dense model's residual stream after it."""
    n = int(np.prod(p[OUT[axis]].shape[:-1]))
    sums = None
    if needed:
        zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
        gram = None if target == "bias" else zeros((n, n))
        sums = _Sums(gram, zeros((cfg.d, n)) if target == "residual" else None, zeros(n), jnp.float32(0))
    after = []
    for d, x in zip(dense, pruned, strict=True):
        y, sums = _step(p, axis, d, None if x is d else x, sums, target, cfg)
        after.append(y)
    return sums, after


def _fitted(p, axis, kept, sums, target, damp, cfg) -> dict:
    """The new output projection, or the new bias, of a sublayer."""
    name = OUT[axis]
    shape, dtype = p[name].shape, p[name].dtype
    per_unit = int(np.prod(shape[1:-1]))
    inputs = (kept[:, None] * per_unit + np.arange(per_unit)).reshape(-1)
    w = np.asarray(p[name].astype(jnp.float32)).reshape(-1, cfg.d).T  # out, in
    gone = np.setdiff1d(np.arange(w.shape[1]), inputs)
    if target == "bias":
        mean = np.asarray(sums.total / sums.tokens, np.float64)
        bias = w[:, gone].astype(np.float64) @ mean[gone]
        bias = bias + np.asarray(p[f"{name}_bias"], np.float64) if f"{name}_bias" in p else bias
        return {name: _zeroed(p[name], kept), f"{name}_bias": jnp.asarray(bias, dtype)}
    if target == "residual":
        fit = least_squares_to(np.asarray(sums.target), np.asarray(sums.gram), w, inputs, damp)
    else:
        fit = masked_least_squares(w, np.asarray(sums.gram), inputs, damp)
    wide = np.zeros((w.shape[1], cfg.d))
    wide[inputs] = fit.T
    return {name: jnp.asarray(wide.reshape(shape), dtype)}


def _zeroed(w, kept):
    return jnp.zeros_like(w).at[kept].set(w[kept])
