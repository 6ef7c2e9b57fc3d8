r"""Second order along gates: what the loss does when a gate goes all the way from 1 to 0.

With :math:`g_u` and :math:`h_{uu}` the first and second derivative of the mean loss by the gate :math:`m_u` at 1, Taylor's
theorem for :math:`m_u = 0` says

.. math:: L(m_u = 0) - L \approx -g_u + \tfrac12 h_{uu}
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxprune.scorers._base import LossFn, Mean, Scorer, Scores, add_to, sequences_in, zeros


def curvature(loss: LossFn, samples: int = 8, seed: int = 0, exact: str = "", axis_name: str | None = None) -> Scorer:
    r"""The change of the loss when a unit goes, to second order: :math:`-g_u + \frac12 h_{uu}`.

    The score has a sign: a unit whose removal should lower the loss scores below zero. Curvature is the Hessian's own, not a
    squared gradient. A product :math:`Hz` is one `jvp` of the gradient by gates. On the axes in `exact`, :math:`h_{uu}` is
    the entry of :math:`H e_u`: one product a unit. On all others it is Hutchinson's estimate, the mean of :math:`z_u (Hz)_u`
    over `samples` draws of random signs :math:`z`, which are zero on the exact axes. The signs depend on `seed` alone, so
    batches add up; the error of the estimate has variance :math:`\sum_{v \neq u} h_{uv}^2 / \text{samples}`.

    Args:
      loss: (params, probes, tokens) -> float32[b] in nats; differentiated twice by its gates.
      samples: draws of random signs.
      seed: of the draws.
      exact: axis letters whose second derivatives are computed unit by unit, e.g. `k`, of which there are few.
      axis_name: mapped axis that the sequences are spread over, or None.

    Returns:
      An additive scorer.

    Raises:
      ValueError: no samples, or an exact axis that the model has no gates for.

    Reference: LeCun et al., Optimal Brain Damage, 1989, section 2 (diagonal second order), for units in place of weights and
    with the first-order term, which is not zero away from a minimum. Bekas et al., An estimator for the diagonal of a
    matrix, 2007: the estimate; for random signs its denominator is the number of draws.

    >>> import jax.numpy as jnp
    >>> from jaxprune import scorers
    >>> loss = lambda w, probes, x: jnp.square((probes["gates"][0]["f"] * w).sum() - x)
    >>> scorer, probes = scorers.curvature(loss, exact="f"), {"gates": ({"f": jnp.ones(2)},)}
    >>> scorers.score(scorer, jnp.array([1.0, 3.0]), probes, [jnp.array([4.0])])[0]["f"].tolist()
    [1.0, 9.0]
    """
    if samples < 1:
        raise ValueError(f"samples: {samples} given; at least 1 draw is needed")

    def init(probes):
        if missing := set(exact) - {axis for layer in probes["gates"] for axis in layer}:
            has = sorted({axis for layer in probes["gates"] for axis in layer})
            raise ValueError(f"exact: axes {sorted(missing)} given; the model has gates on {has}")
        return Mean((zeros(probes["gates"]), zeros(probes["gates"])), jnp.float32(0))

    def update(state, params, probes, tokens):
        ones, unravel = ravel_pytree(jax.tree.map(lambda g: jnp.ones(g.shape, jnp.float32), probes["gates"]))
        one_by_one = np.concatenate(
            [np.full(g.shape, path[-1].key in exact) for path, g in jax.tree_util.tree_leaves_with_path(probes["gates"])]
        )

        def gradient(gates):
            return jax.grad(lambda g: loss(params, {"gates": unravel(g)}, tokens).sum())(gates)

        def times(z):
            return jax.jvp(gradient, (ones,), (z,))[1]

        def draw(total, key):
            z = jnp.where(one_by_one, 0, jax.random.rademacher(key, ones.shape, jnp.float32))
            return total + z * times(z), None

        diagonal = jnp.zeros_like(ones)
        if not one_by_one.all():
            diagonal, _ = jax.lax.scan(draw, diagonal, jax.random.split(jax.random.key(seed), samples))
            diagonal /= samples
        if one_by_one.any():
            units = np.flatnonzero(one_by_one)
            entries = jax.lax.map(lambda u: times(jnp.zeros_like(ones).at[u].set(1))[u], units)
            diagonal = diagonal.at[units].set(entries)
        return add_to(state, (unravel(gradient(ones)), unravel(diagonal)), sequences_in(tokens), axis_name)

    def finalize(state) -> Scores:
        return jax.tree.map(lambda g, h: 0.5 * h - g, *state.value())

    return Scorer(init, update, finalize)
