"""Wanda-sp: Wanda's weight importance, summed over structures."""

import jax
import jax.numpy as jnp

from jaxprune.scorers._base import Scorer
from jaxprune.scorers._sites import Observe, from_sites, over_units, tokens_axes


def wanda(observe: Observe, axis_name: str | None = None) -> Scorer:
    r"""Mean over outputs of weight magnitude times input norm, :math:`\frac1d \sum_i |W_{ij}| \sqrt{\sum_t x_{tj}^2 / n}`.

    Read at the output projections alone; a KV group has the sum of its inputs, a channel its own.

    Args:
      observe: (params, tokens, reduce) -> per layer, as `jaxprune.models.observe` with its configuration bound.
      axis_name: mapped axis that the sequences are spread over, or None.

    Returns:
      An additive scorer.

    Reference: An et al., `FLAP <https://arxiv.org/abs/2312.11983>`_, 2024, baseline Wanda-sp as its released code computes it,
    after Sun et al., `Wanda <https://arxiv.org/abs/2306.11695>`_, 2023, equation 1. Their code divides the square norm by the
    sequences instead of the tokens, which ranks alike. It scores each layer on what the pruned layers before it pass on:
    `jaxprune.sequential.score` does that with any scorer, as the method `wanda-sp` does; alone this one scores a whole model.

    >>> import functools, jax
    >>> from jaxprune import models, scorers
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> scorer = scorers.wanda(functools.partial(models.observe, cfg=cfg))
    >>> params, tokens = models.init(jax.random.key(0), cfg), jax.numpy.arange(12).reshape(2, 6)
    >>> scorers.score(scorer, params, models.probes(cfg), [tokens])[0]["f"].shape
    (48,)
    """

    def collect(sites):
        return {a: jnp.sum(tokens_axes(s.z) ** 2, 0) for a, s in sites.items()}

    def finish(squares, weights, count):
        return jax.tree.map(lambda x, w: over_units(w * jnp.sqrt(x / count)), squares, weights)

    return from_sites(observe, collect, lambda a, w: jnp.mean(jnp.abs(w.astype(jnp.float32)), -1), finish, axis_name)
