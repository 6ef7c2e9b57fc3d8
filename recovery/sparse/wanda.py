r"""Wanda: magnitude times the norm of the input, no update."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxprune.recovery.sparse.pattern import Pattern, keep_largest


def wanda(w: jax.Array | np.ndarray, gram: jax.Array | np.ndarray, pattern: Pattern) -> Bool[Array, "out in"]:
    r"""The weights that stay: in each row those with the largest :math:`|W_{ij}| \, \|x_j\|_2`.

    Args:
      w: [out, in].
      gram: sum of x x^T over calibration tokens, of which the diagonal is read, [in, in].
      pattern: which weights may go.

    Reference: Sun et al., `A Simple and Effective Pruning Approach for Large Language Models
    <https://arxiv.org/abs/2306.11695>`_, 2023, equation 1.

    >>> import numpy as np
    >>> from jaxprune.recovery import sparse
    >>> sparse.wanda(np.array([[3.0, 2.0]]), np.diag([1.0, 4.0]), sparse.Pattern(0.5)).tolist()
    [[False, True]]
    """
    norms = jnp.sqrt(jnp.asarray(np.diag(gram), jnp.result_type(float)))
    return keep_largest(jnp.abs(jnp.asarray(w, norms.dtype)) * norms, pattern, per_row=True)
