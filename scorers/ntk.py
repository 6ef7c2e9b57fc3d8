r"""Scores from the empirical neural tangent kernel of a calibration set, which says how training moves the outputs together.

With :math:`J_{b\theta} = \partial_\theta f_b` the derivative of a function of sequence :math:`b`, the kernel over sequences is
:math:`K_{ab} = \sum_\theta J_{a\theta}\, \phi(J_{b\theta})`: a sum of what the coordinates :math:`\theta \in u` of each unit
contribute, :math:`K^u`, and of what belongs to no unit. A unit that goes takes its :math:`K^u` along.

===========  ====================  =====================  ==============================================
scorer       :math:`\theta`        :math:`\phi`           score of a unit
===========  ====================  =====================  ==============================================
`ntk_gates`  gates                 identity               fall of :math:`\|K\|_F^2` when :math:`K^u` goes
`ntk_sgd`    weights               identity               trace of :math:`K^u`
`ntk_sign`   weights               sign (Adam)            :math:`\langle K, K^u \rangle`
===========  ====================  =====================  ==============================================

The three are this library's own, a reconstruction of the idea that pruning should keep the kernel: they hold the other units'
derivatives fixed. What NIRVANA computes is `nirvana`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxprune.scorers import _aggregate
from jaxprune.scorers._base import LossFn, Mean, Params, Scorer, Scores, add_to, check_axis, sequences_in, zeros
from jaxprune.scorers.taylor import taylor


def nirvana(function: LossFn, axis_name: str | None = None) -> Scorer:
    r"""NIRVANA's score, :math:`\sum_{w \in u} |w\, \partial_w f|`: `taylor` of a function of the logits in place of the loss.

    Args:
      function: (params, probes, tokens) -> float32[b]. NIRVANA's is `jaxprune.models.max_logits_fn`. On a mapped axis build
        it with the same `axis_name`.
      axis_name: mapped axis that the sequences are spread over, or None.

    Returns:
      A scorer that is not additive.

    Reference: Ai et al., `NIRVANA <https://arxiv.org/abs/2509.14230>`_, 2025, as the released code computes it, in float32 (the
    code keeps scores in bfloat16).

    >>> import jax
    >>> from jaxprune import models, scorers
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> params, tokens = models.init(jax.random.key(0), cfg), jax.numpy.arange(12).reshape(2, 6)
    >>> s = scorers.score(scorers.nirvana(models.max_logits_fn(cfg)), params, models.probes(cfg), [tokens])
    >>> s[0]["k"].shape, s[0]["f"].shape
    ((2,), (48,))
    """
    return taylor(function, "param_first", "sum", axis_name)


def ntk_gates(function: LossFn, axis_name: str | None = None) -> Scorer:
    r"""How much of the kernel by gates goes with a unit: :math:`(\|K\|_F^2 - \|K - j_u j_u^\top\|_F^2) / B^2`.

    :math:`j_u \in R^B` is the derivative of each of the :math:`B` sequences' function by the gate of unit :math:`u`,
    :math:`K = \sum_u j_u j_u^\top`, and the score is :math:`(2 j_u^\top K j_u - |j_u|^4) / B^2`, which is at least
    :math:`|j_u|^4 / B^2`: a unit counts by how large its derivatives are and by how well they fit the others'. The fall of the
    trace, :math:`|j_u|^2 / B`, is `fisher(function)`. One gradient a sequence; memory is B numbers a unit.

    Args:
      function: (params, probes, tokens) -> float32[b], e.g. `jaxprune.models.max_logits_fn` or `loss_fn`.
      axis_name: mapped axis that the sequences are spread over, or None.

    Returns:
      A scorer that is not additive.

    Reference: none; see the top of this file.

    >>> import jax.numpy as jnp
    >>> from jaxprune import scorers
    >>> function = lambda w, probes, x: (probes["gates"][0]["f"] * w * x).sum(-1)
    >>> probes, x = {"gates": ({"f": jnp.ones(2)},)}, jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> scorers.score(scorers.ntk_gates(function), jnp.array([1.0, 2.0]), probes, [x])[0]["f"].tolist()
    [0.25, 4.0]
    """

    def update(state, params, probes, tokens):
        del state
        gates = jax.tree.map(lambda g: jnp.ones(g.shape, jnp.float32), probes["gates"])

        def one(sequence):
            alone = jax.tree.map(lambda x: x[None], sequence)
            return jax.grad(lambda g: function(params, {"gates": g}, alone)[0])(gates)

        jacobian = jax.lax.map(one, tokens)  # [b, units] each
        if axis_name is not None:
            jacobian = jax.lax.all_gather(jacobian, axis_name, tiled=True)
        kernel = sum(jnp.matmul(j, j.T, precision="highest") for j in jax.tree.leaves(jacobian))

        def fall(j):
            along = jnp.sum(j * jnp.matmul(kernel, j, precision="highest"), 0)
            return (2 * along - jnp.sum(j * j, 0) ** 2) / j.shape[0] ** 2

        return jax.tree.map(fall, jacobian)

    return Scorer(lambda probes: None, update, lambda state: state, additive=False)


def ntk_sgd(function: LossFn, draws: int | None = None, seed: int = 0, axis_name: str | None = None) -> Scorer:
    r"""What a unit's weights add to the trace of the kernel of gradient descent, :math:`\frac1B \sum_{w \in u, b} J_{bw}^2`.

    Neither the Jacobian nor the kernel is formed: taps square each sequence's gradient and reduce it layer by layer, in one
    backward pass that takes one sequence at a time through a layer. With `draws`, whole batches go through: for random signs
    :math:`r`, :math:`(\sum_b r_b J_{bw})^2` has expectation :math:`\sum_b J_{bw}^2`; one backward pass a draw, whose relative
    variance for one weight is below 2.

    Weights that are zero count: they can learn. So a unit without outgoing weights need not score least.

    Args:
      function: (params, probes, tokens) -> float32[b], with taps. On a mapped axis build it with the same `axis_name`.
      draws: random projections to average, or None for the exact sum.
      seed: of the signs, which follow the order of the sequences.
      axis_name: mapped axis that the sequences are spread over, or None.

    Returns:
      A scorer; additive without `draws`.

    Raises:
      ValueError: draws is less than 1.

    Reference: none; see the top of this file.

    >>> import jax
    >>> from jaxprune import models, scorers
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> params, tokens = models.init(jax.random.key(0), cfg), jax.numpy.arange(12).reshape(2, 6)
    >>> s = scorers.score(scorers.ntk_sgd(models.max_logits_fn(cfg)), params, models.probes(cfg), [tokens])
    >>> s[0]["k"].shape, s[0]["f"].shape
    ((2,), (48,))
    """
    if draws is not None and draws < 1:
        raise ValueError(f"draws: {draws} given; at least 1 is needed, or None for the exact sum")

    def gradient(kind, signs, params, probes, tokens):
        return jax.grad(lambda taps: (signs * function(params, {kind: taps}, tokens)).sum())(zeros(probes["taps"]))

    def draw_signs(key, here):
        if axis_name is None:
            return jax.random.rademacher(key, (here,), jnp.float32)
        signs = jax.random.rademacher(key, (jax.lax.axis_size(axis_name), here), jnp.float32)
        return signs[jax.lax.axis_index(axis_name)]

    def update(state, params, probes, tokens):
        here = sequences_in(tokens)
        if draws is None:
            return add_to(state, gradient("energy", 1.0, params, probes, tokens), here, axis_name, summed=True)

        def draw(total, key):
            energy = gradient("energy_of_sum", draw_signs(key, here), params, probes, tokens)
            return jax.tree.map(lambda s, x: s + x / draws, total, energy), None

        total, _ = jax.lax.scan(draw, zeros(probes["taps"]), jax.random.split(jax.random.key(seed), draws))
        return add_to(state, total, here, axis_name, summed=True)

    return Scorer(
        lambda probes: Mean(zeros(probes["taps"]), jnp.float32(0)),
        update,
        lambda state: _aggregate.aggregate(state.value()),
        additive=draws is None,
    )


def ntk_sign(function: LossFn, sum_over_units: Callable[[Params], tuple], axis_name: str | None = None) -> Scorer:
    r"""The part of a unit's weights in the kernel of sign descent, :math:`\langle K, K^u \rangle_F / B^2`.

    :math:`K_{ab} = \sum_w J_{aw} \operatorname{sign} J_{bw}` over all weights is how a step of sign descent (Adam, early in
    training) on sequence :math:`b` moves the function of sequence :math:`a`, and :math:`K^u` is the sum over the unit's own
    weights. To first order in :math:`\epsilon`, scaling :math:`K^u` by :math:`1 - \epsilon` lowers :math:`\|K\|_F^2` by
    :math:`2 \epsilon B^2` times the score; the scores of all weights add up to :math:`\|K\|_F^2 / B^2`. The score has a sign:
    :math:`K` is not symmetric, and a unit may work against the rest.

    Sequences come one at a time: `sign` of its gradient in a buffer of the size of the weights, `jvp` along it for the column
    :math:`K_{\cdot b}`, and a gradient of the whole set weighted by that column. Weights that are zero count, as in `ntk_sgd`.

    Args:
      function: (params, probes, tokens) -> float32[b]; called with no probes.
      sum_over_units: an element-wise statistic shaped like params -> per layer, axis letter -> tensor name ->
        [unit, ..., channel]. Ours is `jaxprune.models.sum_over_units`.
      axis_name: mapped axis that the sequences are spread over, or None.

    Returns:
      A scorer that is not additive.

    Reference: none; see the top of this file. Malladi et al., `A Kernel-Based View of Language Model Fine-Tuning
    <https://arxiv.org/abs/2210.05643>`_, 2023, has the kernel of sign descent (their asymmetric SignGD kernel).

    >>> import jax.numpy as jnp
    >>> from jaxprune import scorers
    >>> function = lambda w, probes, x: x @ w
    >>> rows = lambda w: ({"f": {"w": w}},)
    >>> x = jnp.array([[1.0, 0.0], [0.0, -2.0]])
    >>> scorers.score(scorers.ntk_sign(function, rows), jnp.ones(2), {}, [x])[0]["f"].tolist()
    [0.25, 1.0]
    """

    def update(state, params, probes, tokens):
        del state, probes
        every = tokens if axis_name is None else jax.lax.all_gather(tokens, axis_name, tiled=True)

        def here(p):
            return function(p, {}, tokens)

        def one(total, sequence):
            alone = jax.tree.map(lambda x: x[None], sequence)
            signs = jax.tree.map(jnp.sign, jax.grad(lambda p: function(p, {}, alone)[0])(params))
            column = jax.jvp(here, (params,), (signs,))[1]
            g = jax.grad(lambda p: (column * here(p)).sum())(params)
            part = sum_over_units(jax.tree.map(lambda s, x: s.astype(jnp.float32) * x.astype(jnp.float32), signs, g))
            return jax.tree.map(jnp.add, total, part), None

        total, _ = jax.lax.scan(one, zeros(jax.eval_shape(sum_over_units, params)), every)
        if axis_name is not None:
            check_axis(axis_name)
            total = jax.lax.psum(total, axis_name)
        return jax.tree.map(lambda x: x / sequences_in(every) ** 2, total)

    def finalize(state) -> Scores:
        return _aggregate.aggregate(state)

    return Scorer(lambda probes: None, update, finalize, additive=False)
