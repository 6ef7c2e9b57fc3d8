r"""The exact answer to many zeros at once: each row's least squares over the weights that stay."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.recovery.sparse.sparsegpt import Sparse
from jaxprune.recovery.sparse.system import System

SOLVERS = ("auto", "exact", "cg")
STEPS = 400  # of conjugate gradients, at most
EXACT = 256  # the largest system of a row that `auto` factors


def compensate(
    w: jax.Array | np.ndarray,
    system: System,
    keep: Any,
    *,
    solver: str = "auto",
    memory: int = 2**28,
    start: Any = None,
) -> Sparse:
    r"""The best weights under a mask, all of a row's zeros at once and all others free.

    For a row `w` whose weights `P` go,

    .. math:: \hat w = w - w_P \, ([H^{-1}]_{PP})^{-1} [H^{-1}]_{P:}, \qquad
        (\hat w - w) H (\hat w - w)^\top = w_P \, ([H^{-1}]_{PP})^{-1} w_P^\top,

    or, the same from the weights `K` that stay, :math:`\hat w_K = w_K + w_P H_{PK} (H_{KK})^{-1}`. Each row takes the smaller
    of the two systems, padded by the identity to the largest of its chunk.

    Args:
      w: [out, in].
      system: of the inputs.
      keep: bool[out, in], the weights that stay.
      solver: `exact` (Cholesky factors, k^3 / 3 operations a row with k the smaller of what goes and what stays), `cg`
        (conjugate gradients for all rows at once, 2 in^2 a row and step, in plain matrix products), or `auto`: `exact` while k
        is at most 256, `cg` above, where it was as fast or faster on 2 cores.
      memory: bytes that the systems of a chunk of rows may take.
      start: weights that conjugate gradients begin with, [out, in]; None is `w`.

    Returns:
      The weights; `keep` as given.

    Raises:
      ValueError: an unknown solver.

    Reference: Zhao et al., `Pruning Foundation Models for High Accuracy without Retraining <https://arxiv.org/abs/2410.15567>`_,
    2024, equations 11 to 13. Conjugate gradients are ours.

    >>> import numpy as np
    >>> from jaxprune.recovery import sparse
    >>> x = np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 6.1]])  # the second input is nearly twice the first
    >>> done = sparse.compensate(np.array([[1.0, 1.0]]), sparse.system(x @ x.T, 1e-6), [[True, False]])
    >>> done.w.round(1).tolist()
    [[3.0, 0.0]]
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver: {solver!r} given; allowed are {', '.join(SOLVERS)}")
    keep = np.asarray(keep, bool)
    stays = keep.sum(1)
    smaller = np.minimum(stays, keep.shape[1] - stays)
    scaled = jnp.asarray(w, system.scale.dtype) * system.scale
    notes = system.notes
    if solver == "exact" or (solver == "auto" and smaller.max(initial=0) <= EXACT):
        fitted = _exact(np.asarray(scaled), system, keep, smaller, memory)
        if np.isfinite(fitted).all():
            return Sparse(jnp.asarray(fitted) / system.scale, jnp.asarray(keep), notes)
        notes += ("conjugate gradients took over: a row's system has no Cholesky factor in float32",)
    first = scaled if start is None else jnp.asarray(start, scaled.dtype) * system.scale
    fitted = _conjugate_gradients(scaled, first, system.gram, jnp.asarray(keep))
    return Sparse(fitted / system.scale, jnp.asarray(keep), notes)


def _exact(w: np.ndarray, system: System, keep: np.ndarray, smaller: np.ndarray, memory: int) -> np.ndarray:
    """Rows of like size share a chunk, and the sizes are rounded up, so that few programs are compiled."""
    out = np.where(keep, w, 0)
    columns = w.shape[1]
    step = max(16, columns // 16)
    for from_gone in (True, False):
        rows = np.flatnonzero((smaller > 0) & (from_gone == ((~keep).sum(1) <= columns / 2)))
        rows = rows[np.argsort(-smaller[rows], kind="stable")]
        while len(rows):
            k = min(-(-smaller[rows[0]] // step) * step, columns)
            most = max(1, min(64, memory // (3 * w.itemsize * k * k)))
            chunk, rows = rows[:most], rows[most:]
            index = np.resize(chunk, most)  # the last chunk repeats rows
            solve = _from_gone if from_gone else _from_kept
            out[chunk] = np.asarray(solve(w[index], keep[index], system.gram, system.inverse, int(k)))[: len(chunk)]
    return out


@functools.partial(jax.jit, static_argnames="k")
def _from_gone(w, keep, gram, inverse, k):
    del gram
    factors = _solve(inverse, ~keep, w, k)
    return jnp.where(keep, w - jnp.matmul(factors, inverse, precision="highest"), 0)


@functools.partial(jax.jit, static_argnames="k")
def _from_kept(w, keep, gram, inverse, k):
    del inverse
    target = jnp.matmul(jnp.where(keep, 0, w), gram, precision="highest")
    return jnp.where(keep, w + _solve(gram, keep, target, k), 0)


def _solve(matrix: jax.Array, mask: jax.Array, b: jax.Array, k: int) -> jax.Array:
    """x of x_r A[S_r, S_r] = b_r[S_r] for each row, S_r the places where its mask is true, at most k; zero elsewhere."""
    index = jnp.argsort(~mask, 1, stable=True)[:, :k]
    real = jnp.take_along_axis(mask, index, 1)

    def one(index, real, b):
        a = jnp.where(real[:, None] & real, matrix[index][:, index], jnp.eye(k, dtype=b.dtype))
        x = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(a), True), jnp.where(real, b[index], 0))
        return jnp.zeros_like(b).at[index].set(x)

    return jax.vmap(one)(index, real, b)


@jax.jit
def _conjugate_gradients(w, start, gram, keep):
    """All rows side by side, each until its residual is 1e-5 of what it is where the zeros are not made up for."""
    times = functools.partial(jnp.matmul, precision="highest")
    largest = jnp.max(jnp.abs(w), 1, keepdims=True)
    unit = jnp.where(largest > 0, largest, 1)  # of each row, so that squares of its residual are not too small for float32
    w, start = w / unit, start / unit

    def left(x):
        return jnp.where(keep, times(w - x, gram), 0)

    plain = left(jnp.where(keep, w, 0))
    goal = 1e-10 * jnp.sum(plain * plain, 1)
    x = jnp.where(keep, start, 0)
    residual = left(x)

    def more(state):
        _, _, _, size, step = state
        return (step < STEPS) & jnp.any(size > goal)

    def advance(state):
        x, r, p, size, step = state
        ap = jnp.where(keep, times(p, gram), 0)
        alpha = jnp.where(size > goal, _ratio(size, jnp.sum(p * ap, 1)), 0)[:, None]
        x, r = x + alpha * p, r - alpha * ap
        new = jnp.sum(r * r, 1)
        return x, r, r + jnp.where(new > goal, _ratio(new, size), 0)[:, None] * p, new, step + 1

    begin = x, residual, residual, jnp.sum(residual * residual, 1), 0
    return unit * jax.lax.while_loop(more, advance, begin)[0]


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
