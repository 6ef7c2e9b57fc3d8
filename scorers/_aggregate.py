"""From the statistics of a unit's tensors to one number per unit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.scorers._base import Scores

REDUCTIONS: dict[str, Callable[..., jax.Array]] = dict(sum=jnp.sum, mean=jnp.mean, max=jnp.max, prod=jnp.prod)


def check(how: str) -> None:
    """Raises ValueError unless `how` names a reduction."""
    if how not in REDUCTIONS:
        raise ValueError(f"aggregate: {how!r} given; allowed are {', '.join(REDUCTIONS)}")


def _channels(x: jax.Array) -> jax.Array:
    """[unit, ..., channel] -> [unit, channel]: the axes between are summed. [unit] becomes [unit, 1]."""
    return x[:, None] if x.ndim == 1 else jnp.sum(x, range(1, x.ndim - 1))


def aggregate(statistics: tuple[dict[str, dict[str, Any]], ...], how: str = "sum", shared: str = "d") -> Scores:
    r"""Reduces over the tensors of a unit channel by channel, then sums the channels.

    With grouped-query attention the query heads of a group are summed first, so that the statistic of channel `h` of query
    heads `(k, 0..g-1)` meets that of channel `h` of key/value head `k`.

    Args:
      statistics: per layer, axis letter -> tensor name -> [unit, ..., channel] or [unit].
      how: sum, mean, max or prod over the tensors.
      shared: axes whose units run through the whole model: the tensors of all layers are reduced together.

    Returns:
      Per layer, axis letter -> float32[units].

    Reference: Ma et al., `LLM-Pruner <https://arxiv.org/abs/2305.11627>`_, 2023, section 3.2 (group importance). Its released
    code aligns grouped query heads with the wrong key/value heads; this does not.

    >>> import jax.numpy as jnp
    >>> from jaxprune.scorers import aggregate
    >>> aggregate(({"f": {"gate": jnp.array([1.0, 2.0]), "down": jnp.array([3.0, 1.0])}},), "max")[0]["f"].tolist()
    [3.0, 2.0]
    """
    check(how)

    def reduce(tensors: dict[str, Any]) -> jax.Array:
        stacked = jnp.stack([_channels(jnp.asarray(x, jnp.float32)) for x in tensors.values()])
        return jnp.sum(REDUCTIONS[how](stacked, axis=0), -1)

    whole = {
        a: reduce({f"{i}/{n}": x for i, layer in enumerate(statistics) for n, x in layer[a].items()})
        for a in shared
        if any(a in layer for layer in statistics)
    }
    return tuple({a: whole[a] if a in whole else reduce(t) for a, t in layer.items()} for layer in statistics)
