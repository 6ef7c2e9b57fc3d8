"""How far a student is from its teacher: divergences of next tokens, distances of residual streams, one number per token."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxprune import models
from jaxprune.models.losses import chunks, joined
from jaxprune.recovery.layer_map import LayerMap


def logit_divergence(
    student: models.Params,
    x: Float[Array, "b t d"],
    cfg: models.LlamaConfig,
    teacher: models.Params,
    y: Float[Array, "b t e"],
    teacher_cfg: models.LlamaConfig,
    *,
    reverse: bool = False,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    chunk: int = 256,
) -> Float[Array, "b t"]:
    r"""Kullback-Leibler divergence between the next-token distributions of teacher and student at each position.

    With :math:`p = \mathrm{softmax}(z^\text{teacher} / T)` and :math:`q = \mathrm{softmax}(z^\text{student} / T)`,

    .. math:: T^2 \sum_v p_v (\log p_v - \log q_v), \qquad \text{reverse: } T^2 \sum_v q_v (\log q_v - \log p_v)

    The factor keeps gradients at the size that they have for T = 1. With `top_k` the outcomes are the teacher's k most likely
    tokens and, as one more outcome, all other tokens together: their probabilities are summed in both models, none is
    renormalised. This is a lower bound of the whole divergence, zero for equal models and equal to the whole at k = v - 1.

    Args:
      student, x, cfg: its weights, of which the head is read, and its residual stream after the final norm, as
        `models.hidden` returns it.
      teacher, y, teacher_cfg: the same of the teacher, which gets no gradient.
      reverse: the expectation is over the student's distribution: it may leave modes of the teacher's out, but pays for tokens
        that the teacher finds unlikely.
      temperature: T above.
      top_k: k above; None is all tokens. Between the forward and the backward pass k + 1 numbers a token are kept instead
        of the teacher's logits being made again.
      chunk: tokens whose logits are in memory at a time.

    Returns:
      Nats times T^2, float32.

    Reference: Hinton et al., `Distilling the Knowledge in a Neural Network <https://arxiv.org/abs/1503.02531>`_, 2015,
    section 2; the reverse direction is that of Gu et al., `MiniLLM <https://arxiv.org/abs/2306.08543>`_, 2023, equation 1,
    token by token on given text, where theirs samples the text from the student.

    >>> import jax
    >>> from jaxprune import models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> params = models.init(jax.random.key(0), cfg)
    >>> x = models.hidden(params, jax.numpy.arange(10).reshape(2, 5), cfg)
    >>> whole, top = (logit_divergence(params, -x, cfg, params, x, cfg, top_k=k) for k in (None, 8))
    >>> bool((0 < top).all()), bool((top <= whole).all())
    (True, True)
    """
    k = top_k if top_k is not None and top_k < cfg.vocab else None

    def one(z):
        logits = models.head(teacher, z[1], teacher_cfg) / temperature
        ids = None if k is None else checkpoint_name(jax.lax.top_k(logits, k)[1], "teacher")
        p = _outcomes(logits, ids)
        p = jax.lax.stop_gradient(p if k is None else checkpoint_name(p, "teacher"))
        q = _outcomes(models.head(student, z[0], cfg) / temperature, ids)
        p, q = (q, p) if reverse else (p, q)
        return jnp.sum(jnp.exp(p) * (p - q), -1)

    one = jax.checkpoint(one, policy=jax.checkpoint_policies.save_only_these_names("teacher"))
    return temperature**2 * joined(jax.lax.map(one, (chunks(x, chunk), chunks(y, chunk))), x.shape[1])


def _outcomes(logits: jax.Array, ids: jax.Array | None) -> jax.Array:
    """Log-probabilities of the tokens `ids` [..., k] and of all others together, [..., k + 1]; of all if there are none."""
    logits = jax.nn.log_softmax(logits, -1)
    if ids is None:
        return logits
    others = jnp.put_along_axis(logits, ids, -jnp.inf, -1, inplace=False)
    top = jnp.take_along_axis(logits, ids, -1)
    return jnp.concatenate([top, jax.nn.logsumexp(others, -1, keepdims=True)], -1)


def hidden_distance(
    states: Float[Array, "s b t d"], teacher_states: Float[Array, "r b t d"], layer_map: LayerMap
) -> Float[Array, "b t"]:
    r"""Normalised mean square :math:`|x - y|^2 / |y|^2` of the residual streams at each position, the mean over layers.

    Each token is divided by its own norm: the first one of a sequence has a stream hundreds of times as large as the others.

    Args:
      states: of the student, from `models.residuals`.
      teacher_states: of the teacher.
      layer_map: pairs of layers after which they are compared.

    >>> import jax.numpy as jnp
    >>> states = jnp.ones((3, 1, 2, 4))
    >>> hidden_distance(states, 2 * states, [(0, 0), (1, 1)]).tolist()
    [[0.25, 0.25]]
    """
    own, other = (jnp.array(layers) + 1 for layers in zip(*layer_map, strict=True))
    x, y = states[own].astype(jnp.float32), jax.lax.stop_gradient(teacher_states[other].astype(jnp.float32))
    return jnp.mean(relative_square(x - y, y), 0)


def relative_square(error: Float[Array, "*n d"], scale: Float[Array, "*n d"]) -> Float[Array, "*n"]:
    """Sum of squares of `error` over the last axis, divided by that of `scale`."""
    return jnp.sum(error**2, -1) / jnp.maximum(jnp.sum(scale**2, -1), jnp.finfo(jnp.float32).tiny)
