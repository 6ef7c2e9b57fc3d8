"""Random scores: what every method must beat."""

import jax
import jax.numpy as jnp

from jaxprune.scorers._base import Scorer


def random(key: jax.Array) -> Scorer:
    """Uniform random numbers, one per unit.

    Args:
      key: a `jax.random.key`; the same key gives the same scores.

    Returns:
      A scorer that needs no data.

    >>> import jax, jax.numpy as jnp
    >>> from jaxprune import scorers
    >>> s = scorers.score(scorers.random(jax.random.key(0)), None, {"gates": ({"f": jnp.ones(3)},)})
    >>> s[0]["f"].shape
    (3,)
    """

    def init(probes):
        leaves, tree = jax.tree.flatten(probes["gates"])
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(tree, [jax.random.uniform(k, x.shape, jnp.float32) for k, x in zip(keys, leaves, strict=True)])

    return Scorer(init, lambda state, params, probes, tokens: state, lambda state: state, additive=False, needs="weights")
