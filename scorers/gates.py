r"""Scores from derivatives by gates: one number :math:`m_u` multiplies the output of unit :math:`u`, 1 keeps it, 0 removes it.

By the chain rule :math:`\partial_m L = \sum_w w\, \partial_w L` over the unit's outgoing weights, so nothing the size of the
weights is ever differentiated, and sums over sequences add up.
"""

import jax
import jax.numpy as jnp

from jaxprune.scorers._base import LossFn, Mean, Scorer, Scores, add_to, sequences_in, zeros


def _init(probes):
    return Mean(zeros(probes["gates"]), jnp.float32(0))


def _gradient(loss: LossFn, params, probes, tokens):
    gates = jax.tree.map(lambda g: jnp.ones(g.shape, jnp.float32), probes["gates"])
    return jax.grad(lambda g: loss(params, {"gates": g}, tokens).sum())(gates)


def gate_taylor(loss: LossFn, axis_name: str | None = None) -> Scorer:
    r"""First-order Taylor score of gates, :math:`|\frac1N \sum_j \partial_m L_j|`: the change of the loss when the unit goes.

    Args:
      loss: (params, probes, tokens) -> float32[b] in nats.
      axis_name: mapped axis that the sequences are spread over, or None.

    Returns:
      An additive scorer.

    Reference: Molchanov et al., `Importance Estimation for Neural Network Pruning <https://arxiv.org/abs/1906.10771>`_, 2019,
    section 3.1 (gates), without its square.

    >>> import jax.numpy as jnp
    >>> from jaxprune import scorers
    >>> loss = lambda w, probes, x: (probes["gates"][0]["f"] * w * x[:, None]).sum(-1)
    >>> probes = {"gates": ({"f": jnp.ones(2)},)}
    >>> scorers.score(scorers.gate_taylor(loss), jnp.array([1.0, -3.0]), probes, [jnp.array([1.0, 2.0])])[0]["f"].tolist()
    [1.5, 4.5]
    """

    def update(state, params, probes, tokens):
        return add_to(state, _gradient(loss, params, probes, tokens), sequences_in(tokens), axis_name)

    def finalize(state) -> Scores:
        return jax.tree.map(jnp.abs, state.value())

    return Scorer(_init, update, finalize)


def fisher(loss: LossFn, axis_name: str | None = None) -> Scorer:
    r"""Empirical Fisher information of gates, :math:`\frac1N \sum_j (\partial_m L_j)^2`.

    The square is taken of each sequence's own derivative, one sequence at a time.

    Args:
      loss: (params, probes, tokens) -> float32[b] in nats.
      axis_name: mapped axis that the sequences are spread over, or None.

    Returns:
      An additive scorer.

    Reference: Theis et al., `Faster gaze prediction with dense networks and Fisher pruning
    <https://arxiv.org/abs/1801.05787>`_, 2018, equation 6, without its factor 1/2.

    >>> import jax.numpy as jnp
    >>> from jaxprune import scorers
    >>> loss = lambda w, probes, x: (probes["gates"][0]["f"] * w * x[:, None]).sum(-1)
    >>> probes = {"gates": ({"f": jnp.ones(2)},)}
    >>> scorers.score(scorers.fisher(loss), jnp.array([1.0, -3.0]), probes, [jnp.array([1.0, 2.0])])[0]["f"].tolist()
    [2.5, 22.5]
    """

    def update(state, params, probes, tokens):
        def one(total, sequence):
            g = _gradient(loss, params, probes, jax.tree.map(lambda x: x[None], sequence))
            return jax.tree.map(lambda s, x: s + x * x, total, g), None

        squares, _ = jax.lax.scan(one, zeros(probes["gates"]), tokens)
        return add_to(state, squares, sequences_in(tokens), axis_name)

    return Scorer(_init, update, lambda state: state.value())
