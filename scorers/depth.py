"""Keeping the first layers of a model."""

import jax
import jax.numpy as jnp

from jaxprune.scorers._base import Scorer


def earliest(layers: int) -> Scorer:
    """Scores every unit of layer i with `layers - i`, so that the last layers go first.

    Args:
      layers: number of layers of the model.

    Reference: Ma et al., `LLM-Pruner <https://arxiv.org/abs/2305.11627>`_, 2023, layer-wise mode, which keeps the first layers.

    >>> import jax.numpy as jnp
    >>> from jaxprune import scorers
    >>> s = scorers.score(scorers.earliest(2), None, {"gates": ({"f": jnp.ones(1)}, {"f": jnp.ones(1)})})
    >>> [float(layer["f"][0]) for layer in s]
    [2.0, 1.0]
    """

    def init(probes):
        return tuple(
            jax.tree.map(lambda g, i=i: jnp.full(g.shape, layers - i, jnp.float32), layer)
            for i, layer in enumerate(probes["gates"])
        )

    return Scorer(init, lambda state, params, probes, tokens: state, lambda state: state, additive=False, needs="weights")
