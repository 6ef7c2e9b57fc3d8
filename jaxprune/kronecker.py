r"""The scorer of the default recipe: Optimal Brain Surgeon with Kronecker-factored Fisher information."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.models import LlamaConfig, Params, PerLayer, loss_fn, observe, sample_targets
from jaxprune.recovery import greedy
from jaxprune.scorers import Scorer
from jaxprune.scorers._sites import grams


class State(NamedTuple):
    """Sums over tokens, and the weights.

    Attributes:
      grams: x x^T of what each output projection reads, per layer and axis letter, float32[in, in].
      metrics: g g^T of the gradient of the loss by what it adds to the residual stream, float32[d, d].
      weights: the output projections, [units..., d].
      tokens: how many.
    """

    grams: PerLayer
    metrics: PerLayer
    weights: PerLayer
    tokens: jax.Array


def kronecker_obs(
    cfg: LlamaConfig, key: jax.Array, *, step: int = 16, damp: float = 1e-2, fisher: bool = True, axis_name: str | None = None
) -> Scorer:
    r"""The loss, to second order, of removing a unit and all cheaper ones of its sublayer and re-fitting the others.

    The Hessian of the loss by an output projection is approximated by :math:`G \otimes F`: G the second moment of its inputs, F
    that of the gradient of the loss at its output, with labels drawn from the model (the true Fisher). Units go greedily, see
    `jaxprune.recovery.greedy`. The sorted scores of a sublayer are its curve of loss against width, so `allocate.lagrangian`
    can weigh layers against each other.

    Args:
      cfg: the model.
      key: of the drawn labels.
      step: MLP channels removed between two updates of the inverse.
      damp: added to the diagonal of G, in means of it.
      fisher: False takes the identity for F: the error of each layer's output.
      axis_name: mapped axis that the sequences are spread over, or None.

    Returns:
      An additive scorer (up to the drawn labels), in nats a token; its state holds the matrices G and F, and the weights, of
      every sublayer that it is given probes of. Probes of a few consecutive layers, `{}` for the others, take less memory and
      give these layers the same scores.

    Reference: van der Ouderaa et al., `The LLM Surgeon <https://arxiv.org/abs/2312.17244>`_, 2024, section 3, for the factored
    curvature; Kurtic et al., `ZipLM <https://arxiv.org/abs/2302.04089>`_, 2023, algorithm 1, for the greedy removal. The labels
    are drawn, the units are KV groups and MLP channels, and only output projections are re-fitted.

    >>> import jax
    >>> from jaxprune import kronecker, models, scorers
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> params, tokens = models.init(jax.random.key(0), cfg), jax.numpy.arange(12).reshape(2, 6)
    >>> s = scorers.score(kronecker.kronecker_obs(cfg, jax.random.key(1)), params, models.probes(cfg), [tokens])
    >>> s[0]["k"].shape, s[0]["f"].shape
    ((2,), (48,))
    """
    loss = loss_fn(cfg)

    def collect(sites):
        return grams(sites), {a: s.w.astype(jnp.float32) for a, s in sites.items()}

    def init(probes: Any) -> State:
        inputs = probes["inputs"]
        moments = tuple({a: jnp.zeros((x.size, x.size), jnp.float32) for a, x in layer.items()} for layer in inputs)
        weights = tuple({a: jnp.zeros((*x.shape, cfg.d), jnp.float32) for a, x in layer.items()} for layer in inputs)
        return State(moments, jax.tree.map(jnp.zeros_like, probes["output"]), weights, jnp.float32(0))

    def update(state: State, params: Params, probes: Any, tokens: jax.Array) -> State:
        asked = [i for i, layer in enumerate(probes["inputs"]) if layer]
        near = range(asked[0], asked[-1] + 1)
        seen = list(observe(params, tokens, collect, cfg, near))
        none: Any = ({}, {})
        moments, weights = zip(*[none] * near.start, *seen, *[none] * (len(cfg.layers) - near.stop), strict=True)
        metrics = jax.tree.map(jnp.zeros_like, probes["output"])
        if fisher:
            own = jax.random.fold_in(key, state.tokens.astype(jnp.int32))
            if axis_name is not None:
                own = jax.random.fold_in(own, jax.lax.axis_index(axis_name))
            labelled = sample_targets(params, tokens, cfg, own)
            length = tokens.shape[1]  # the loss of a sequence is a mean over its tokens, the curvature is of their sum
            metrics = jax.grad(lambda m: length * loss(params, {"output": m}, labelled).sum())(metrics)
        count = jnp.float32(tokens.size)
        if axis_name is not None:
            moments, metrics, count = jax.lax.psum((moments, metrics, count), axis_name)
        return State(
            jax.tree.map(jnp.add, state.grams, moments),
            jax.tree.map(jnp.add, state.metrics, metrics),
            weights,
            state.tokens + count,
        )

    def one(axis: str, gram, metric, w, tokens) -> jax.Array:
        rows = np.asarray(w, np.float64).reshape(-1, w.shape[-1])
        scale = float(tokens)
        f = np.asarray(metric, np.float64) / scale if fisher else None
        size = len(rows) // w.shape[0]
        curve = greedy(rows, np.asarray(gram, np.float64) / scale, f, size=size, step=step if axis == "f" else 1, damp=damp)
        return jnp.asarray(curve / 2, jnp.float32)

    def finalize(state: State):
        layers = zip(state.grams, state.metrics, state.weights, strict=True)
        return tuple({a: one(a, g[a], m[a], w[a], state.tokens) for a in g} for g, m, w in layers)

    return Scorer(init, update, finalize)
