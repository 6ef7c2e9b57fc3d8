r"""Second moments of a layer's inputs, damped and factored: what SparseGPT and APT solve with."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import lapack

from jaxprune.recovery._solve import damping

DEAD = 1e-6  # what an input that was never seen counts, in means of the others


class System(NamedTuple):
    r""":math:`H = G + \delta I` for inputs scaled so that its diagonal is one: weights are multiplied by `scale` first.

    Scaling changes no minimum and no score :math:`w_j^2 / [H^{-1}]_{jj}`; it is what lets float32 do.

    Attributes:
      gram: the scaled H, [in, in].
      inverse: of `gram`.
      factor: upper triangular U with U^T U = inverse.
      scale: [in].
      notes: what had to be done to get here.
    """

    gram: jax.Array
    inverse: jax.Array
    factor: jax.Array
    scale: jax.Array
    notes: tuple[str, ...] = ()


def system(gram: jax.Array | np.ndarray, damp: float = 1e-2) -> System:
    r"""Damps, scales and inverts, in float64 on the host.

    An input that was always zero gets a scale near zero: its weights go first, those of them that stay are not changed, and no
    other weight is changed for them. Where the Cholesky factorisation fails, it is repeated with ten times the damping, and at
    last with the diagonal alone.

    Args:
      gram: sum of x x^T over calibration tokens, [in, in].
      damp: added to the diagonal, in means of it.

    Raises:
      ValueError: a statistic that is not finite, or a negative damping.

    Reference: Frantar and Alistarh, `SparseGPT <https://arxiv.org/abs/2301.00774>`_, 2023, algorithm 1 and section 4 (damping
    of 1 %). Its code sets the weights of inputs that were always zero to zero; here those that the pattern keeps stay.

    >>> import numpy as np
    >>> from jaxprune.recovery import sparse
    >>> s = sparse.system(np.diag([4.0, 0.0]))
    >>> s.gram.tolist(), s.notes
    ([[1.0, 0.0], [0.0, 1.0]], ('1 of 2 inputs were always zero',))
    """
    gram = np.asarray(gram, np.float64)
    if not np.isfinite(gram).all():
        raise ValueError("sparsify: the statistics contain NaN or infinity; check the weights and the calibration data")
    if not damp >= 0:
        raise ValueError(f"damp: {damp} given; it must be 0 or positive, such as 0.01")
    dead = np.diag(gram) <= 0
    notes = [f"{dead.sum()} of {len(dead)} inputs were always zero"] if dead.any() else []
    damps = [damp, *(max(damp, 1e-8) * 10.0**k for k in range(1, 9))]
    for tried in [d for d in damps if d == damp or d <= 1]:
        h = gram.copy()
        h[np.diag_indices_from(h)] += damping(gram, tried)
        found = _factored(h, dead)
        if found is not None:
            notes += [f"damping raised from {damp:g} to {tried:g} of the mean diagonal"] if tried != damp else []
            return _made(found, notes)
    diagonal = np.diag(np.diag(gram) + damping(gram, 1e-2))
    notes.append("correlations between inputs left out: their second moments cannot be factored")
    found = _factored(diagonal, dead)
    assert found is not None
    return _made(found, notes)


def _made(found: tuple[np.ndarray, ...], notes: list[str]) -> System:
    gram, inverse, factor, scale = (jnp.asarray(x, jnp.result_type(float)) for x in found)
    return System(gram, inverse, factor, scale, tuple(notes))


def _factored(h: np.ndarray, dead: np.ndarray) -> tuple[np.ndarray, ...] | None:
    """The fields of a `System`, or None where h has no Cholesky factor or it is useless.

    With rows and columns in reverse h is R^T R, so U is the inverse of R^T in reverse: n^3 operations for U and the inverse, a
    quarter of factoring, solving for the unit matrix and factoring again. What LAPACK leaves by columns is read by rows, which
    transposes it without a copy.
    """
    diagonal = np.diag(h).copy()
    if not (diagonal > 0).all():
        return None
    scale = np.sqrt(diagonal)
    scaled = h / np.outer(scale, scale)
    if dead.any() and not dead.all():
        scale[dead] = DEAD * scale[~dead].mean()
    upper, failed = lapack.dpotrf(np.ascontiguousarray(scaled[::-1, ::-1]).T, overwrite_a=True)
    if failed:
        return None
    backward, failed = lapack.dtrtri(upper, overwrite_c=True)
    if failed:
        return None
    factor = np.ascontiguousarray(backward.T[::-1, ::-1])
    product, _ = lapack.dlauum(backward, overwrite_c=True)
    inverse = _mirrored(np.ascontiguousarray(product.T[::-1, ::-1]))
    probe = np.random.default_rng(0).choice([-1.0, 1.0], (len(h), 4))
    error = np.abs(scaled @ (inverse @ probe) - probe).max()
    return (scaled, inverse, factor, scale) if error < 1e-3 else None


def _mirrored(x: np.ndarray, strip: int = 256) -> np.ndarray:
    """The symmetric matrix with the upper half of x, which is overwritten; in strips that caches hold."""
    for i in range(0, len(x), strip):
        x[i + strip :, i : i + strip] = x[i : i + strip, i + strip :].T
        block = x[i : i + strip, i : i + strip]
        block[:] = np.triu(block) + np.triu(block, 1).T
    return x


def relative_loss(w: Any, new: Any, gram: Any) -> float:
    r"""The error of a layer's output, :math:`\sum_t |(W - \hat W) x_t|^2 / \sum_t |W x_t|^2`; 0 where the layer does nothing.

    Args:
      w, new: [out, in].
      gram: sum of x x^T over calibration tokens, [in, in].

    >>> import numpy as np
    >>> from jaxprune.recovery import sparse
    >>> sparse.relative_loss(np.array([[2.0, 1.0]]), np.array([[2.0, 0.0]]), np.eye(2))
    0.2
    """
    w, new, gram = (np.asarray(x, np.float64) for x in (w, new, gram))
    whole = float(np.sum((w @ gram) * w))
    change = w - new
    return max(float(np.sum((change @ gram) * change)), 0.0) / whole if whole > 0 else 0.0
