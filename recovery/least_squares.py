r"""Masked least squares: the weights of the units that stay, chosen so that the output of the layer changes least.

With :math:`G = \sum_t x_t x_t^\top` over calibration tokens, a weight `W` [out, in] and kept inputs `K`,

.. math:: W_K = W G_\delta[:, K] \, G_\delta[K, K]^{-1}, \qquad G_\delta = G + \delta I,

minimises :math:`\sum_t |W x_t - W_K x_{t,K}|^2` plus a ridge towards the kept columns of `W`. One kernel serves the reformation
of Search-LLM, the compensation of Numerical Pruning and the structured case of APT.
"""

from collections.abc import Sequence

import numpy as np
import scipy.linalg

from jaxprune.recovery._solve import damping, inverse, solve


def masked_least_squares(w: np.ndarray, gram: np.ndarray, keep: np.ndarray, damp: float = 1e-2) -> np.ndarray:
    r"""The best weights on the kept inputs; `w` itself when every input is kept.

    Args:
      w: [out, in].
      gram: sum of x x^T over calibration tokens, [in, in].
      keep: sorted indices of the inputs that stay.
      damp: ridge, in means of the diagonal of `gram`; it pulls towards `w[:, keep]`.

    Returns:
      float64[out, kept], finite whatever the rank of `gram`.

    Raises:
      ValueError: a statistic that is not finite.

    Reference: Shen et al., `Numerical Pruning for Efficient Autoregressive Models <https://arxiv.org/abs/2412.12441>`_, 2024,
    theorem 3, in the equal form without its inverse; the damping stands on both sides, so keeping everything changes nothing.

    >>> import numpy as np
    >>> from jaxprune import recovery
    >>> x = np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])  # the second input is twice the first
    >>> recovery.masked_least_squares(np.array([[1.0, 1.0]]), x @ x.T, np.array([0]), damp=1e-9).round(6).tolist()
    [[3.0]]
    """
    if len(keep) == len(gram):
        return np.asarray(w, np.float64)
    return least_squares_to(np.asarray(w, np.float64) @ np.asarray(gram, np.float64), gram, w, keep, damp)


def least_squares_to(target: np.ndarray, gram: np.ndarray, w: np.ndarray, keep: np.ndarray, damp: float = 1e-2) -> np.ndarray:
    r"""The weights whose output on the kept inputs comes nearest to given targets, with a ridge towards `w`.

    .. math:: W_K = (T + \delta W[:, K]) (G[K, K] + \delta I)^{-1}, \qquad T = \sum_t y_t x_{t,K}^\top

    Args:
      target: sum of y x^T over calibration tokens, with y what the layer should add to the residual stream, [out, in].
      gram: sum of x x^T over calibration tokens, [in, in].
      w: [out, in].
      keep: sorted indices of the inputs that stay.
      damp: ridge, in means of the diagonal of `gram`.

    Returns:
      float64[out, kept].

    Raises:
      ValueError: a statistic that is not finite.

    >>> import numpy as np
    >>> from jaxprune import recovery
    >>> x, w = np.random.default_rng(0).normal(size=(3, 50)), np.array([[1.0, -2.0, 0.5]])
    >>> same = recovery.least_squares_to(w @ x @ x.T, x @ x.T, w, np.arange(3))
    >>> bool(np.abs(same - w).max() < 1e-12)
    True
    """
    gram, w, target = (np.asarray(a, np.float64) for a in (gram, w, target))
    ridge = damping(gram, damp)
    kept = gram[np.ix_(keep, keep)] + ridge * np.eye(len(keep))
    return solve(kept, (target[:, keep] + ridge * w[:, keep]).T).T


def nested_least_squares(
    w: np.ndarray, gram: np.ndarray, order: np.ndarray, counts: Sequence[int], damp: float = 1e-2
) -> list[np.ndarray]:
    r"""`masked_least_squares` for the first inputs of an order, for several numbers of them, from one Cholesky factor.

    Kept sets that lie inside each other are leading blocks of the ordered :math:`G_\delta`, whose factors are leading blocks of
    its factor.

    Args:
      w: [out, in].
      gram: sum of x x^T over calibration tokens, [in, in].
      order: all inputs, those that stay longest first.
      counts: how many of them are kept.
      damp: as in `masked_least_squares`.

    Returns:
      For each count float64[out, count], the columns in the given order.

    >>> import numpy as np
    >>> from jaxprune import recovery
    >>> x, w, order = np.random.default_rng(0).normal(size=(4, 50)), np.ones((2, 4)), np.array([2, 0, 3, 1])
    >>> two = recovery.nested_least_squares(w, x @ x.T, order, [2, 4])[0]
    >>> bool(np.abs(two - recovery.masked_least_squares(w, x @ x.T, order[:2])).max() < 1e-12)
    True
    """
    gram, w = np.asarray(gram, np.float64), np.asarray(w, np.float64)
    ridge = damping(gram, damp)
    rows = (w @ gram + ridge * w)[:, order].T
    try:
        factor = scipy.linalg.cholesky(gram[np.ix_(order, order)] + ridge * np.eye(len(order)), lower=True)
    except scipy.linalg.LinAlgError:
        return [masked_least_squares(w, gram, order[:n], damp) if n < len(order) else w[:, order] for n in counts]
    half = scipy.linalg.solve_triangular(factor, rows, lower=True)
    return [
        scipy.linalg.solve_triangular(factor[:n, :n], half[:n], lower=True, trans="T").T if n < len(order) else w[:, order]
        for n in counts
    ]


def admm(
    w: np.ndarray, gram: np.ndarray, kept: np.ndarray, rho: float = 1.0, iterations: int = 30, damp: float = 0.0
) -> np.ndarray:
    """Masked least squares by alternating directions, with one inverse for all rows, whatever their masks.

    Inputs are scaled to unit norm first: without that, `rho` means nothing.

    Args:
      w: [out, in].
      gram: sum of x x^T over calibration tokens, [in, in].
      kept: bool[out, in] or bool[in], the weights that stay.
      rho: penalty, in units of the scaled Gram matrix, whose diagonal is one.
      iterations: of alternating directions.
      damp: added to the scaled diagonal.

    Returns:
      float64[out, in], zero where nothing is kept.

    Reference: Shen et al., `Search for Efficient Large Language Models <https://arxiv.org/abs/2409.17372>`_, 2024, theorem 3.1
    (rho 1, 30 iterations); the scaling is of Boza, `Fast and Effective Weight Update for Pruned Large Language Models
    <https://arxiv.org/abs/2401.02938>`_, 2024. The theorem prints the projection with the mask of pruned weights; the mask of
    kept ones is meant.

    >>> import numpy as np
    >>> from jaxprune import recovery
    >>> x, w = np.random.default_rng(0).normal(size=(3, 50)), np.array([[1.0, -2.0, 0.5]])
    >>> exact = recovery.masked_least_squares(w, x @ x.T, np.array([0, 2]), damp=1e-12)
    >>> bool(np.abs(recovery.admm(w, x @ x.T, np.array([True, False, True]))[:, [0, 2]] - exact).max() < 1e-3)
    True
    """
    gram, w = np.asarray(gram, np.float64), np.asarray(w, np.float64)
    norm = np.sqrt(np.diag(gram)) + 1e-8
    scaled = gram / np.outer(norm, norm) + damp * np.eye(len(gram))
    w = w * norm
    target = scaled @ w.T
    shared = inverse(scaled + rho * np.eye(len(gram)))
    x, u = w, np.zeros_like(w)
    for _ in range(iterations):
        z = (x + u) * kept
        u = u + x - z
        x = (shared @ (target + rho * (z - u).T)).T
    return (x + u) * kept / norm
