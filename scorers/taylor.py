r"""Taylor importance of weights, summed over units (Ma et al., `LLM-Pruner <https://arxiv.org/abs/2305.11627>`_, 2023).

With :math:`g_j` the gradient of the loss of sequence :math:`j` by a weight :math:`w`, :math:`\bar g = \frac1N \sum_j g_j` and
:math:`A = \frac1N \sum_j g_j^2`, a tensor of a unit has in each of its channels the statistic

===============  ==========================================
`param_first`    :math:`\sum |w \bar g|`
`param_second`   :math:`\sum w^2 A`
`param_mix`      :math:`\sum |w \bar g - \frac12 w^2 A|`
`vectorize`      :math:`|\sum w \bar g|`
===============  ==========================================
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxprune.scorers import _aggregate
from jaxprune.scorers._base import LossFn, Mean, Params, Scorer, add_to, check_axis, sequences_in, zeros

KINDS = dict(param_first="abs", param_second="square", param_mix="mix", vectorize="sum")


def _check(variant: str, aggregate: str) -> None:
    if variant not in KINDS:
        raise ValueError(f"variant: {variant!r} given; allowed are {', '.join(KINDS)}")
    _aggregate.check(aggregate)


def taylor(loss: LossFn, variant: str = "param_first", aggregate: str = "sum", axis_name: str | None = None) -> Scorer:
    """Taylor importance from taps: no weight gradient outlives its layer.

    Args:
      loss: (params, probes, tokens) -> float32[b] in nats, whose taps are described in `jaxprune.models.types`. On a mapped
        axis build it with the same `axis_name`, so that gradients are summed before their absolute value is taken.
      variant: `param_first`, `param_second`, `param_mix` or `vectorize`, see the top of this file.
      aggregate: how the tensors of a unit are combined, channel by channel: sum, mean, max or prod.
      axis_name: mapped axis (`pmap`, `shard_map`) that the sequences are spread over, or None.

    Returns:
      A scorer; additive for `param_second` and `vectorize`.

    Raises:
      ValueError: unknown variant or aggregation.

    Reference: LLM-Pruner, equations 3 and 5. The second-order term is the mean over sequences, as in the released code
    (equation 5 prints a sum); channels of grouped query heads are aligned with their own key/value head (the released code
    aligns them with another).

    >>> import jax
    >>> from jaxprune import models, scorers
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> scorer = scorers.taylor(models.loss_fn(cfg), "param_first")
    >>> params, tokens = models.init(jax.random.key(0), cfg), jax.numpy.arange(12).reshape(2, 6)
    >>> s = scorers.score(scorer, params, models.probes(cfg), [tokens])
    >>> s[0]["k"].shape, s[0]["f"].shape
    ((2,), (48,))
    """
    _check(variant, aggregate)
    kind = KINDS[variant]
    additive = kind in ("sum", "square")

    def init(probes):
        return Mean(zeros(probes["taps"]), jnp.float32(0))

    def update(state, params, probes, tokens):
        grads = jax.grad(lambda taps: loss(params, {kind: taps}, tokens).sum())(zeros(probes["taps"]))
        # `outer` of the model's taps has summed the gradients over a mapped axis already
        return add_to(state, grads, sequences_in(tokens), axis_name, summed=True)

    def finalize(state):
        mean = state.value()
        return _aggregate.aggregate(jax.tree.map(jnp.abs, mean) if kind == "sum" else mean, aggregate)

    return Scorer(init, update, finalize, additive=additive)


def full_taylor(
    loss: LossFn,
    sum_over_units: Callable[[Params], tuple],
    variant: str = "param_first",
    aggregate: str = "sum",
    axis_name: str | None = None,
) -> Scorer:
    """Taylor importance from full weight gradients: the definition that taps are tested against, for any loss and any pytree.

    It holds one gradient the size of the weights, two where squares are needed, and works for units that have no taps (the
    residual width).

    Args:
      loss: (params, probes, tokens) -> float32[b]; called with no probes.
      sum_over_units: an element-wise statistic shaped like params -> per layer, axis letter -> tensor name ->
        [unit, ..., channel], by summing over all other axes. Ours is `jaxprune.models.sum_over_units`.
      variant, aggregate, axis_name: as in `taylor`.

    Returns:
      A scorer that is not additive.

    Raises:
      ValueError: unknown variant or aggregation.

    Reference: as `taylor`.

    >>> import jax.numpy as jnp
    >>> from jaxprune import scorers
    >>> loss = lambda w, probes, x: (x @ w).sum(-1)
    >>> rows = lambda w: ({"f": {"w": w.sum(1)}},)
    >>> scorer = scorers.full_taylor(loss, rows)
    >>> w, x = jnp.array([[1.0, -2.0], [3.0, 4.0]]), jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> scorers.score(scorer, w, {}, [x])[0]["f"].tolist()
    [6.0, 21.0]
    """
    _check(variant, aggregate)
    second = variant in ("param_second", "param_mix")

    def moments(params, tokens):
        if not second:
            return jax.grad(lambda p: loss(p, {}, tokens).sum())(params), None

        def one(sums, sequence):
            g = jax.grad(lambda p: loss(p, {}, jax.tree.map(lambda x: x[None], sequence))[0])(params)
            g = jax.tree.map(lambda x: x.astype(jnp.float32), g)
            return jax.tree.map(lambda s, x: (s[0] + x, s[1] + x * x), sums, g, is_leaf=lambda s: isinstance(s, tuple)), None

        start = jax.tree.map(lambda x: (jnp.zeros(x.shape, jnp.float32),) * 2, params)
        sums, _ = jax.lax.scan(one, start, tokens)
        return tuple(jax.tree.map(lambda s, i=i: s[i], sums, is_leaf=lambda s: isinstance(s, tuple)) for i in (0, 1))

    def statistic(w, g, g2):
        w, g = w.astype(jnp.float32), g.astype(jnp.float32)
        if variant == "param_second":
            return w * w * g2
        out = w * g - 0.5 * w * w * g2 if variant == "param_mix" else w * g
        return out if variant == "vectorize" else jnp.abs(out)

    def init(probes):
        del probes
        return None

    def update(state, params, probes, tokens):
        del state, probes
        g, g2 = moments(params, tokens)
        n = jnp.float32(sequences_in(tokens))
        if axis_name is not None:
            check_axis(axis_name)
            g, g2, n = jax.lax.psum((g, g2, n), axis_name)
        g2 = params if g2 is None else g2  # unused leaves of the right structure
        sums = sum_over_units(jax.tree.map(statistic, params, g, g2))
        return jax.tree.map(lambda x: x / n, sums)

    def finalize(state):
        return _aggregate.aggregate(jax.tree.map(jnp.abs, state) if variant == "vectorize" else state, aggregate)

    return Scorer(init, update, finalize, additive=False)
