"""Weight magnitude: a yardstick that needs no data, and loses."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxprune.scorers import _aggregate
from jaxprune.scorers._base import Params, Scorer


def magnitude(sum_over_units: Callable[[Params], tuple], p: int = 2, aggregate: str = "mean") -> Scorer:
    r"""Sum of :math:`|w|^p` over the weights of a unit.

    Args:
      sum_over_units: an element-wise statistic shaped like params -> per layer, axis letter -> tensor name ->
        [unit, ..., channel]. Ours is `jaxprune.models.sum_over_units`.
      p: 1 or 2.
      aggregate: how the tensors of a unit are combined, channel by channel.

    Returns:
      A scorer that needs weights alone.

    Raises:
      ValueError: p is neither 1 nor 2, or an unknown aggregation.

    Reference: Li et al., `Pruning Filters for Efficient ConvNets <https://arxiv.org/abs/1608.08710>`_, 2017, section 3.1, as
    LLM-Pruner's yardstick computes it: no root, tensors averaged.

    >>> import jax.numpy as jnp
    >>> from jaxprune import scorers
    >>> rows = lambda w: ({"f": {"w": w.sum(1)}},)
    >>> scorers.score(scorers.magnitude(rows, p=1), jnp.array([[1.0, -2.0], [3.0, 4.0]]), {})[0]["f"].tolist()
    [3.0, 7.0]
    """
    if p not in (1, 2):
        raise ValueError(f"p: {p} given; allowed are 1 and 2")
    _aggregate.check(aggregate)

    def update(state, params, probes, tokens):
        del state, probes, tokens
        return sum_over_units(jax.tree.map(lambda w: jnp.abs(w.astype(jnp.float32)) ** p, params))

    return Scorer(
        lambda probes: None, update, lambda state: _aggregate.aggregate(state, aggregate), additive=False, needs="weights"
    )
