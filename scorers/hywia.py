"""HyWIA: fine and coarse Taylor importance, fused with weights that depend on the layer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxprune.scorers import _aggregate
from jaxprune.scorers._base import LossFn, Mean, Scorer, Scores, add_to, sequences_in, zeros

FUSIONS = ("attention", "fixed", "uncertainty")
EPS = 1e-12


def hywia(
    loss: LossFn,
    fusion: str = "attention",
    alpha: float = 0.5,
    temperature: float = 1.0,
    aggregate: str = "sum",
    axis_name: str | None = None,
) -> Scorer:
    r"""Fine importance (`param_mix`) and coarse importance (`vectorize`), each divided by its mean, fused per layer and axis.

    With :math:`\hat c, \hat f` the two scores of the :math:`n` units of a layer and axis, both of mean 1, the score is
    :math:`a \hat c + (1 - a) \hat f`, where :math:`a` is

    =============  ====================================================================================================
    `attention`    the first column's mean of softmax of the rows of :math:`X^\top X / (n \tau)`, :math:`X = [\hat c, \hat f]`
    `fixed`        :math:`\alpha`
    `uncertainty`  :math:`\sigma_f^2 / (\sigma_c^2 + \sigma_f^2)`, with the variances over the units
    =============  ====================================================================================================

    Both scores come from the taps of one gradient. `fixed` with `alpha=1` ranks as `taylor(loss, "vectorize")`, with `alpha=0`
    as `taylor(loss, "param_mix")`.

    Args:
      loss: as in `taylor`.
      fusion: `attention`, `fixed` or `uncertainty`.
      alpha: weight of the coarse score, from 0 to 1; read by `fixed` alone.
      temperature: tau; read by `attention` alone. A large one gives both scores the same weight.
      aggregate, axis_name: as in `taylor`.

    Returns:
      A scorer that is not additive.

    Raises:
      ValueError: unknown fusion or aggregation, alpha outside 0 to 1, temperature not positive.

    Reference: Liu et al., `HyWIA <https://arxiv.org/abs/2403.10799>`_, 2024: that fine and coarse Taylor importance are fused
    by attention, adaptively. Its fusion equations were not available and no code was found: those above are a reconstruction,
    without trained parameters. `uncertainty` follows the idea of `SAAP <https://arxiv.org/abs/2412.15127>`_, 2024; its
    equation above is a reconstruction too: weights in inverse proportion to the variance, the minimum of the Gaussian loss.

    >>> import jax
    >>> from jaxprune import models, scorers
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> params, tokens = models.init(jax.random.key(0), cfg), jax.numpy.arange(12).reshape(2, 6)
    >>> s = scorers.score(scorers.hywia(models.loss_fn(cfg)), params, models.probes(cfg), [tokens])
    >>> s[0]["f"].shape, round(float(s[0]["f"].mean()), 4)
    ((48,), 1.0)
    """
    _aggregate.check(aggregate)
    weigh = _weight_of_coarse(fusion, alpha, temperature)

    def init(probes):
        return Mean({kind: zeros(probes["taps"]) for kind in ("sum", "mix")}, jnp.float32(0))

    def update(state, params, probes, tokens):
        taps = {kind: zeros(probes["taps"]) for kind in ("sum", "mix")}
        grads = jax.grad(lambda taps: loss(params, taps, tokens).sum())(taps)
        return add_to(state, grads, sequences_in(tokens), axis_name, summed=True)

    def fuse(coarse: jax.Array, fine: jax.Array) -> jax.Array:
        c, f = (x / (jnp.mean(x) + EPS) for x in (coarse, fine))
        a = weigh(c, f)
        return a * c + (1 - a) * f

    def finalize(state) -> Scores:
        mean = state.value()
        coarse, fine = (_aggregate.aggregate(x, aggregate) for x in (jax.tree.map(jnp.abs, mean["sum"]), mean["mix"]))
        return jax.tree.map(fuse, coarse, fine)

    return Scorer(init, update, finalize, additive=False)


def _weight_of_coarse(fusion: str, alpha: float, temperature: float) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(coarse, fine), both of mean 1, -> the weight of the coarse score."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: {alpha} given; allowed are numbers from 0 (fine scores alone) to 1 (coarse scores alone)")
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature} given; it must be positive")

    def attention(c, f):
        x = jnp.stack([c, f])  # the two scores are the tokens, their units the features
        similar = jnp.matmul(x, x.T, precision="highest") / (c.shape[0] * temperature)
        return jax.nn.softmax(similar, -1)[:, 0].mean()

    def uncertainty(c, f):
        return (jnp.var(f) + EPS) / (jnp.var(c) + jnp.var(f) + 2 * EPS)

    match fusion:
        case "attention":
            return attention
        case "fixed":
            return lambda c, f: jnp.float32(alpha)
        case "uncertainty":
            return uncertainty
    raise ValueError(f"fusion: {fusion!r} given; allowed are {', '.join(FUSIONS)}")
