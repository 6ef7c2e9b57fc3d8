r"""SparseGPT: columns from left to right, each error passed on to the columns that are still to come."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.recovery.sparse.pattern import Pattern, above
from jaxprune.recovery.sparse.system import System


class Sparse(NamedTuple):
    """A matrix with zeros.

    Attributes:
      w: the weights, [out, in].
      keep: bool[out, in], what stays; `w` is exactly zero elsewhere.
      notes: what had to be done otherwise than asked.
    """

    w: jax.Array
    keep: jax.Array
    notes: tuple[str, ...] = ()


def sparsegpt(
    w: jax.Array | np.ndarray,
    system: System,
    pattern: Pattern,
    *,
    block: int = 128,
    joint: bool = False,
    per_row: bool = False,
    keep: Any = None,
) -> Sparse:
    r"""Chooses the weights that go, block by block of columns, and updates the columns to the right.

    With :math:`U^\top U = H^{-1}`, the weight `w_j` costs :math:`w_j^2 / U_{jj}^2` and, when it goes, the columns
    :math:`i > j` change by :math:`-w_j U_{ji} / U_{jj}`. In each block the cheapest weights of all rows go, or of each M
    columns of a row all but N.

    Args:
      w: [out, in].
      system: of the inputs.
      pattern: which weights may go; N:M needs a number of inputs that M divides.
      block: columns whose weights compete.
      joint: choose each group of N:M by the cost of removing its weights together, over all patterns (the mask M of APT).
      per_row: as many zeros in each row of a block, instead of in all rows of it together.
      keep: bool[out, in], use this mask and choose none.

    Returns:
      The weights and what stays.

    Reference: Frantar and Alistarh, `SparseGPT <https://arxiv.org/abs/2301.00774>`_, 2023, algorithm 1. Its code removes one
    weight more in each block, for it compares with `<=`; here the number is exact.

    >>> import numpy as np
    >>> from jaxprune.recovery import sparse
    >>> x, w = np.random.default_rng(0).normal(size=(4, 50)), np.array([[1.0, -2.0, 3.0, 4.0]])
    >>> done = sparse.sparsegpt(w, sparse.system(x @ x.T), sparse.Pattern(0.5))
    >>> done.keep.tolist()
    [[False, False, True, True]]
    """
    rows, columns = w.shape
    size = -(-min(block, columns) // max(pattern.m, 1)) * max(pattern.m, 1)
    widths = [min(size, columns - start) for start in range(0, columns, size)]
    counts = np.asarray([pattern.zeros((1 if per_row else rows) * width) for width in widths])
    given = None if keep is None else np.asarray(keep, bool)
    groups = pattern._replace(fraction=0.0)  # the counts say it; one program for all fractions
    new, kept = _swept(np.asarray(w), system.factor, system.scale, counts, given, size, groups, joint, per_row)
    return Sparse(new, kept, system.notes)


@functools.partial(jax.jit, static_argnames=("size", "pattern", "joint", "per_row"))
def _swept(w, factor, scale, counts, given, size, pattern: Pattern, joint, per_row):
    """Pads the columns to whole blocks and transposes, so that a column of the matrix lies in one piece."""
    columns = w.shape[1]
    spare = len(counts) * size - columns
    wt = jnp.pad((w.astype(scale.dtype) * scale).T, ((0, spare), (0, 0)))
    u = jnp.pad(factor, (0, spare)) + jnp.diag(jnp.pad(jnp.zeros(columns, wt.dtype), (0, spare), constant_values=1))
    given = None if given is None else jnp.pad(given.T, ((0, spare), (0, 0)))
    wt, kept = _sweep(wt, u, counts, given, columns, size, pattern, joint, per_row)
    return wt[:columns].T / scale, kept[:columns].T


def _sweep(wt, u, counts, given, columns, size, pattern: Pattern, joint, per_row):
    """The new weights and what stays, both [in, out]."""
    total = len(wt)

    def one_block(wt, i_count):
        i, count = i_count
        start = i * size
        w1 = jax.lax.dynamic_slice_in_dim(wt, start, size)
        rows_u = jax.lax.dynamic_slice_in_dim(u, start, size)
        u1 = jax.lax.dynamic_slice_in_dim(rows_u, start, size, 1)
        if given is not None:
            keep = jax.lax.dynamic_slice_in_dim(given, start, size)
        elif pattern.m:
            keep = jnp.ones(w1.shape, bool)  # chosen when the sweep arrives at the group
        else:
            scores = jnp.where((start + jnp.arange(size) < columns)[:, None], (w1 / jnp.diagonal(u1)[:, None]) ** 2, jnp.inf)
            keep = above(scores.T, count).T if per_row else above(scores.reshape(-1), count).reshape(w1.shape)

        def choose(j, w1, keep):
            group = jax.lax.dynamic_slice_in_dim(w1, j, pattern.m)
            own = jax.lax.dynamic_slice(u1, (j, j), (pattern.m, pattern.m))
            inverse = jnp.matmul(own.T, own, precision="highest") if joint else jnp.diag(jnp.diagonal(own) ** 2)
            best = best_groups(group.T[:, None], inverse[None], pattern, joint)[:, 0].T
            return jax.lax.dynamic_update_slice_in_dim(keep, best, j, 0)

        def column(j, state):
            w1, errors, keep = state
            if pattern.m and given is None:
                keep = jax.lax.cond(j % pattern.m == 0, choose, lambda j, w1, keep: keep, j, w1, keep)
            error = jnp.where(keep[j], 0, w1[j]) / u1[j, j]
            here = jnp.where(keep[j], w1[j], 0)
            w1 = (w1 - u1[j][:, None] * error).at[j].set(here)
            return w1, errors.at[j].set(error), keep

        w1, errors, keep = jax.lax.fori_loop(0, size, column, (w1, jnp.zeros_like(w1), keep))
        later = jnp.where(jnp.arange(total) >= start + size, rows_u, 0)
        wt = wt - jnp.matmul(later.T, errors, precision="highest")
        return jax.lax.dynamic_update_slice_in_dim(wt, w1, start, 0), keep

    wt, kept = jax.lax.scan(one_block, wt, (jnp.arange(len(counts)), counts))
    return wt, kept.reshape(wt.shape)


def best_groups(w: jax.Array, inverse: jax.Array, pattern: Pattern, joint: bool) -> jax.Array:
    r"""What stays in groups of M inputs, by the least cost of what goes.

    The weights P cost :math:`w_P ([H^{-1}]_{PP})^{-1} w_P` together (`joint`), :math:`w_j^2 / [H^{-1}]_{jj}` each by itself.

    Args:
      w: [out, groups, M].
      inverse: of H, its blocks on the diagonal, [groups, M, M].
      pattern: N:M.
      joint: compare all patterns by the cost of their weights together; else the N best weights stay.

    Returns:
      bool[out, groups, M].

    Reference: Zhao et al., `Pruning Foundation Models for High Accuracy without Retraining <https://arxiv.org/abs/2410.15567>`_,
    2024, equations 12 and 14.
    """
    if not joint:
        return above(w * w / jnp.diagonal(inverse, axis1=1, axis2=2), pattern.m - pattern.n)
    gone = jnp.asarray(list(itertools.combinations(range(pattern.m), pattern.m - pattern.n)))  # patterns, M - N

    def better(best, index):
        block = inverse[:, index][:, :, index]
        part = w[..., index]
        factor = jnp.linalg.cholesky(block)
        half = jax.lax.linalg.triangular_solve(
            factor, jnp.swapaxes(part, 0, 1), left_side=False, lower=True, transpose_a=True
        )  # groups, out, M - N
        cost = jnp.sum(half * half, -1).T
        stays = jnp.ones(pattern.m, bool).at[index].set(False)
        return (jnp.minimum(cost, best[0]), jnp.where((cost < best[0])[..., None], stays, best[1])), None

    start = jnp.full(w.shape[:2], jnp.inf, w.dtype), jnp.zeros(w.shape, bool)
    (_, keep), _ = jax.lax.scan(better, start, gone)
    return keep
