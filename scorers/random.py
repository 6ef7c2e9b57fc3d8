"""Random scores: what every method must beat."""

import jax
import jax.numpy as jnp

from jaxprune.scorers._base import Scorer


def random(key: jax.Array, shared: str = "d") -> Scorer:
    """Uniform random numbers, one per unit.

    Args:
      key: a `jax.random.key`; the same key gives the same scores.
      shared: axes whose units run through the whole model: every layer gets the same scores.

    Returns:
      A scorer that needs no data.

    >>> import jax, jax.numpy as jnp
    >>> from jaxprune import scorers
    >>> s = scorers.score(scorers.random(jax.random.key(0)), None, {"gates": ({"f": jnp.ones(3)},)})
    >>> s[0]["f"].shape
    (3,)
    """

    def init(probes):
        def draw(layer: int, axis: str, units: int) -> jax.Array:
            keyed = jax.random.fold_in(key, ord(axis))
            keyed = keyed if axis in shared else jax.random.fold_in(keyed, layer)
            return jax.random.uniform(keyed, (units,), jnp.float32)

        return tuple({a: draw(i, a, g.shape[0]) for a, g in layer.items()} for i, layer in enumerate(probes["gates"]))

    return Scorer(init, lambda state, params, probes, tokens: state, lambda state: state, additive=False, needs="weights")
