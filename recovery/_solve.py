"""Symmetric positive semi-definite systems that never fail: damped, with retries, in float64 on the host."""

import numpy as np
import scipy.linalg


def solve(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """x of a x = b, for a symmetric positive semi-definite matrix that may have lost its rank to rounding.

    Tries the Cholesky factor of `a`, then of `a + e I` with e = 1e-8, 1e-7, ... of the mean diagonal, then least squares.

    Args:
      a: [n, n].
      b: [n, m].

    Returns:
      float64[n, m], finite.

    Raises:
      ValueError: the input is not finite.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("solve: the statistics contain NaN or infinity; check the weights and the calibration data")
    if not a.size:
        return np.zeros_like(b)
    size = float(np.trace(a)) / len(a)
    for extra in (0.0, *(10.0**-k for k in range(8, 1, -1))):
        try:
            factor = scipy.linalg.cho_factor(a + extra * size * np.eye(len(a)), check_finite=False)
        except scipy.linalg.LinAlgError:
            continue
        x = scipy.linalg.cho_solve(factor, b, check_finite=False)
        if np.isfinite(x).all():
            return x
    return scipy.linalg.lstsq(a, b, check_finite=False)[0]


def inverse(a: np.ndarray) -> np.ndarray:
    """The inverse of a symmetric positive semi-definite matrix, see `solve`."""
    return solve(a, np.eye(len(a)))


def damping(gram: np.ndarray, damp: float) -> float:
    """What is added to the diagonal: `damp` means of it, or 1 where it is empty."""
    size = float(np.trace(np.asarray(gram, np.float64))) / max(len(gram), 1)
    return damp * size if size > 0 else 1.0


def damped(gram: np.ndarray, damp: float) -> np.ndarray:
    """`gram` with `damping(gram, damp)` added to its diagonal, float64."""
    return np.asarray(gram, np.float64) + damping(gram, damp) * np.eye(len(gram))
