r"""APT: many weights removed at once, the mask and the weights each by a single-weight or a joint solution."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.recovery.sparse.compensate import compensate
from jaxprune.recovery.sparse.pattern import Pattern
from jaxprune.recovery.sparse.sparsegpt import Sparse, sparsegpt
from jaxprune.recovery.sparse.system import System

VARIANTS = ("SS", "SM", "MS", "MM")


def apt(
    w: jax.Array | np.ndarray,
    system: System,
    pattern: Pattern,
    variant: str = "SM",
    *,
    block: int | None = None,
    per_row: bool = False,
    solver: str = "auto",
) -> Sparse:
    r"""A mask from a sweep over the columns, and weights that are the exact answer to it.

    ========  ===================================================  ====================================================
    variant   mask                                                 weights
    ========  ===================================================  ====================================================
    SS        :math:`w_j^2 / [H^{-1}]_{jj}`, a weight by itself    one column after the other, those to the left frozen
    SM        the same                                             all of a row's zeros at once, see `compensate`
    MS        of N:M the pattern of least joint cost               as SS
    MM        the same                                             as SM
    ========  ===================================================  ====================================================

    The scores are those of the sweep of `sparsegpt`: from weights that the zeros so far have changed, with the inverse over the
    columns that remain. SS is SparseGPT.

    Args:
      w: [out, in].
      system: of the inputs.
      pattern: which weights may go; a mask by M needs N:M.
      variant: see above.
      block: columns after which all weights are fitted again before the mask goes on, for SM and MM; None is one fit at the
        end. 128 lowers the loss of a layer by some per cent and takes in / 128 fits.
      per_row: as many zeros in each row of a block of columns, instead of in all rows together.
      solver: as in `compensate`.

    Raises:
      ValueError: an unknown variant, or a joint mask without N:M.

    Reference: Zhao et al., `Pruning Foundation Models for High Accuracy without Retraining <https://arxiv.org/abs/2410.15567>`_,
    2024, equations 11 to 14, as later code that cites them has them. No code was released: how masks follow updates is ours.

    >>> import numpy as np
    >>> from jaxprune.recovery import sparse
    >>> rng = np.random.default_rng(0)
    >>> x, w = rng.normal(size=(8, 8)) @ rng.normal(size=(8, 99)), rng.normal(size=(4, 8))
    >>> s = sparse.system(x @ x.T)
    >>> ss, mm = (sparse.apt(w, s, sparse.n_of_m("2:4"), v).w for v in ("SS", "MM"))
    >>> sparse.relative_loss(w, mm, x @ x.T) < sparse.relative_loss(w, ss, x @ x.T)
    True
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant: {variant!r} given; allowed are {', '.join(VARIANTS)}")
    joint = variant[0] == "M"
    if joint and not pattern.m:
        raise ValueError(f"variant: {variant} given; a joint mask compares the patterns of N:M: give --nm 2:4, or variant SM")
    if variant[1] == "S":
        return sparsegpt(w, system, pattern, joint=joint, per_row=per_row)
    w = jnp.asarray(w, system.scale.dtype)
    columns = w.shape[1]
    size = columns if block is None else -(-block // max(pattern.m, 1)) * max(pattern.m, 1)
    done = Sparse(w, jnp.ones(w.shape, bool), system.notes)
    for start in range(0, columns, size):
        here = slice(start, start + size)
        part = system._replace(factor=system.factor[here, here], scale=system.scale[here])
        mask = sparsegpt(done.w[:, here], part, pattern, joint=joint, per_row=per_row).keep
        done = compensate(w, system, done.keep.at[:, here].set(mask), solver=solver, start=done.w)
    return done
