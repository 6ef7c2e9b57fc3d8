"""Patterns of zeros: a fraction of the weights, or N that stay of each M inputs in a row."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


class Pattern(NamedTuple):
    """Which weights of a matrix may go.

    Attributes:
      fraction: of the weights that go, 0 to 1.
      n, m: of each m consecutive inputs of an output at most n stay; both 0 where the zeros may be anywhere.
    """

    fraction: float
    n: int = 0
    m: int = 0

    def zeros(self, weights: int) -> int:
        """How many of so many weights go."""
        return math.floor(weights * self.fraction + 1e-9)


def n_of_m(text: str) -> Pattern:
    """The pattern `N:M`: of each M consecutive inputs at most N stay.

    Raises:
      ValueError: the text has another form, or N is not between 1 and M - 1.

    >>> from jaxprune.recovery import sparse
    >>> sparse.n_of_m("2:4")
    Pattern(fraction=0.5, n=2, m=4)
    """
    parts = text.split(":")
    if len(parts) == 2 and all(p.isdecimal() for p in parts):
        n, m = map(int, parts)
        if 1 <= n < m <= 16:
            return Pattern(1 - n / m, n, m)
    raise ValueError(f"nm: {text!r} given; give N:M with N weights that stay of M, M at most 16, such as 2:4 or 4:8")


def keep_largest(scores: Float[Array, "out in"], pattern: Pattern, per_row: bool = False) -> Bool[Array, "out in"]:
    """True for the weights with the largest scores.

    Args:
      scores: of all weights; of equal ones those of lower index go first.
      pattern: which may go.
      per_row: as many zeros in each row; otherwise in the whole matrix. N:M is per row in any case.

    >>> import jax.numpy as jnp
    >>> from jaxprune.recovery import sparse
    >>> sparse.keep_largest(jnp.array([[1.0, 4.0, 3.0, 2.0]]), sparse.Pattern(0.25)).tolist()
    [[False, True, True, True]]
    >>> sparse.keep_largest(jnp.array([[1.0, 4.0, 3.0, 2.0]]), sparse.n_of_m("1:2")).tolist()
    [[False, True, True, False]]
    """
    rows, columns = scores.shape
    if pattern.m:
        return _above(scores.reshape(rows, -1, pattern.m), pattern.m - pattern.n).reshape(rows, columns)
    if per_row:
        return _above(scores, pattern.zeros(columns))
    return _above(scores.reshape(-1), pattern.zeros(scores.size)).reshape(rows, columns)


@jax.jit
def _above(scores: jax.Array, count: Any) -> jax.Array:
    return ranks(scores) >= count


def ranks(scores: jax.Array) -> jax.Array:
    """The position of each number among those of the last axis, from the smallest; ties in the order of their index."""
    return jnp.argsort(jnp.argsort(scores, -1, stable=True), -1, stable=True)


def violations(w: Any, pattern: Pattern) -> int:
    """Groups of M inputs in which more than N weights are not zero; 0 for a pattern without groups.

    >>> import numpy as np
    >>> from jaxprune.recovery import sparse
    >>> sparse.violations(np.array([[1.0, 0.0, 0.0, 2.0], [1.0, 0.0, 2.0, 3.0]]), sparse.n_of_m("2:4"))
    1
    """
    if not pattern.m:
        return 0
    return int(((np.asarray(w) != 0).reshape(len(w), -1, pattern.m).sum(-1) > pattern.n).sum())
