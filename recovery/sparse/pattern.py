"""Patterns of zeros: a fraction of the weights, or N that stay of each M inputs in a row."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

FEW = 16  # the largest M


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
        if 1 <= n < m <= FEW:
            return Pattern(1 - n / m, n, m)
    raise ValueError(f"nm: {text!r} given; give N:M with N weights that stay of M, M at most {FEW}, such as 2:4 or 4:8")


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
    return above(scores, count)


def above(scores: jax.Array, count: Any) -> jax.Array:
    """False for the so many smallest numbers of the last axis; of equal ones those of lower index are smaller.

    XLA sorts slowly on CPUs. Few numbers are compared with each other; of many the largest that is False is found bit by bit.
    """
    n = scores.shape[-1]
    if n <= FEW:
        one, other = scores[..., :, None], scores[..., None, :]
        before = (other < one) | ((other == one) & (jnp.arange(n) < jnp.arange(n)[:, None]))
        return jnp.sum(before, -1) >= count
    size = 8 * scores.dtype.itemsize
    top = jnp.asarray(1 << (size - 1), f"uint{size}")
    bits = jax.lax.bitcast_convert_type(scores, f"uint{size}")
    bits = jnp.where(bits & top, ~bits, bits | top)  # in the order of the numbers

    def lower(i, least):
        tried = least | (top >> i.astype(top.dtype))
        enough = jnp.sum(bits < tried, -1, keepdims=True) >= count
        return jnp.where(enough, least, tried)

    last = jax.lax.fori_loop(0, size, lower, jnp.zeros((*bits.shape[:-1], 1), top.dtype))
    equal = bits == last
    spare = count - jnp.sum(bits < last, -1, keepdims=True)
    return (bits > last) | (equal & (jnp.cumsum(equal, -1) > spare))


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
