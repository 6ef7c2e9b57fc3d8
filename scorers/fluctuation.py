"""FLAP: how much the inputs of an output projection fluctuate, weighed by its columns."""

import jax.numpy as jnp

from jaxprune.scorers._base import Scorer
from jaxprune.scorers._sites import Observe, from_sites, over_units, tokens_axes

VARIANTS = ("wifv", "ifv", "wifn")


def fluctuation(observe: Observe, variant: str = "wifv", standardized: bool = True, axis_name: str | None = None) -> Scorer:
    r"""Variance of each input over tokens times the square norm of its weights, :math:`\operatorname{Var}_t(x_{tj}) |W_j|^2`.

    An input that hardly varies can be replaced by its mean, which a bias stands for (`recovery.reconstruct` with target
    `bias`). Of the attention the score is squared. Scores are standardised over the inputs of each layer and sublayer; a KV
    group has the mean of its inputs.

    Args:
      observe: (params, tokens, reduce) -> per layer, as `jaxprune.models.observe` with its configuration bound.
      variant: `wifv` as above; `ifv`, the variance alone; `wifn`, mean magnitude of the weights times the root mean square.
      standardized: subtract the mean of a layer and sublayer and divide by the standard deviation, so that layers compare.
      axis_name: mapped axis that the sequences are spread over, or None.

    Returns:
      An additive scorer.

    Raises:
      ValueError: unknown variant.

    Reference: An et al., `FLAP <https://arxiv.org/abs/2312.11983>`_, 2024, equations 5 to 8. The variance is over tokens of the
    whole calibration set; the released code updates a running one with a biased step. KV groups take their query heads along.

    >>> import functools, jax
    >>> from jaxprune import models, scorers
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> scorer = scorers.fluctuation(functools.partial(models.observe, cfg=cfg))
    >>> params, tokens = models.init(jax.random.key(0), cfg), jax.numpy.arange(12).reshape(2, 6)
    >>> abs(float(scorers.score(scorer, params, models.probes(cfg), [tokens])[0]["f"].mean())) < 1e-5
    True
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant: {variant!r} given; allowed are {', '.join(VARIANTS)}")

    def collect(sites):
        rows = {a: tokens_axes(s.z) for a, s in sites.items()}
        return {a: (jnp.sum(x, 0), jnp.sum(x * x, 0)) for a, x in rows.items()}

    def weigh(axis, w):
        del axis
        w = w.astype(jnp.float32)
        return jnp.mean(jnp.abs(w), -1) if variant == "wifn" else jnp.sum(w * w, -1)

    def one(axis, sums, w, count):
        mean, square = sums[0] / count, sums[1] / count
        variance = jnp.maximum(square - mean * mean, 0) * count / jnp.maximum(count - 1, 1)
        s = {"wifv": variance * w, "ifv": variance, "wifn": w * jnp.sqrt(square)}[variant]
        s = s * s if axis == "k" else s
        s = (s - jnp.mean(s)) / (jnp.std(s) + 1e-12 * jnp.mean(jnp.abs(s)) + 1e-30) if standardized else s
        return over_units(s, jnp.mean)

    def finish(sums, weights, count):
        layers = zip(sums, weights, strict=True)
        return tuple({a: one(a, layer[a], w[a], count) for a in layer} for layer, w in layers)

    return from_sites(observe, collect, weigh, finish, axis_name)
