"""Numerical Pruning: a relaxed mask that keeps a layer's output, by Newton's method in closed form."""

import jax.numpy as jnp
import numpy as np

from jaxprune.scorers._base import Scorer
from jaxprune.scorers._sites import Observe, from_sites, grams


def numerical(observe: Observe, damp: float = 1e-2, axis_name: str | None = None) -> Scorer:
    r"""The relaxed mask z of the inputs of an output projection that changes its output least for a given sum of z.

    .. math:: \min_z \tfrac12 \sum_i \| X W_i - X (z \odot W_i) \|^2 + \tfrac\lambda2 (\mathbf 1^\top z - r)^2

    is quadratic, so one Newton step from anywhere is exact. With :math:`A = (W W^\top) \odot (X^\top X)`,
    :math:`a = A^{-1} \mathbf 1` and :math:`\lambda \to \infty`, :math:`z = 1 - \rho D a / \sum a` for a removed fraction
    :math:`\rho`, which ranks like the score :math:`-D a / \sum a` whatever the fraction; a KV group has the mean of its inputs.

    Args:
      observe: (params, tokens, reduce) -> per layer, as `jaxprune.models.observe` with its configuration bound.
      damp: added to the diagonal of A, in means of it.
      axis_name: mapped axis that the sequences are spread over, or None.

    Returns:
      An additive scorer whose state is the Gram matrix of every output projection's inputs.

    Reference: Shen et al., `Numerical Pruning for Efficient Autoregressive Models <https://arxiv.org/abs/2412.12441>`_, 2024,
    algorithm 1 and equations 6 to 8. The paper takes about 50 Newton steps and does not say its :math:`\lambda`; the limit
    makes the score independent of the scale of a layer. The damping is ours.

    >>> import functools, jax
    >>> from jaxprune import models, scorers
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> scorer = scorers.numerical(functools.partial(models.observe, cfg=cfg))
    >>> params, tokens = models.init(jax.random.key(0), cfg), jax.numpy.arange(12).reshape(2, 6)
    >>> round(float(scorers.score(scorer, params, models.probes(cfg), [tokens])[0]["f"].mean()), 3)
    -1.0
    """

    def weigh(axis, w):
        del axis
        return w.astype(jnp.float32)

    def one(gram, w):
        units = w.shape[0]
        w = np.asarray(w, np.float64).reshape(len(gram), -1)
        matrix = (w @ w.T) * np.asarray(gram, np.float64)
        size = float(np.mean(np.diag(matrix))) or 1.0
        a = np.linalg.solve(matrix + damp * size * np.eye(len(matrix)), np.ones(len(matrix)))
        return jnp.asarray((-len(a) * a / a.sum()).reshape(units, -1).mean(1), jnp.float32)

    def finish(sums, weights, count):
        del count
        return tuple({a: one(g[a], w[a]) for a in g} for g, w in zip(sums, weights, strict=True))

    return from_sites(observe, grams, weigh, finish, axis_name)
