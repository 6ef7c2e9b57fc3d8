"""What scores and training differentiate: next-token losses and functions of the logits, one number per sequence."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxprune.models._mesh import by_sequence, from_parts, in_parts, ways
from jaxprune.models.forward import hidden
from jaxprune.models.llama import capped, head
from jaxprune.models.types import Config, LossFn, Params, Probes, Tokens


def token_losses(
    params: Params, x: Float[Array, "b t d"], targets: Int[Array, "b t"], cfg: Config, chunk: int = 256
) -> Float[Array, "b t"]:
    """Cross-entropy of each target in nats, float32, the logits of about `chunk` tokens at a time in memory of a device."""

    @jax.checkpoint
    def one(z):
        logits = head(params, z[0], cfg)
        return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, z[1][..., None], -1)[..., 0]

    return joined(jax.lax.map(one, (chunks(x, chunk), chunks(targets, chunk))), x.shape[1])


def chunks(x: jax.Array, most: int) -> jax.Array:
    """[b, t, ...] as parts [n, b, times, ...] of about `most` tokens: times of every sequence, so that a mesh shares each.

    On a mesh each of its parts has so many: a head that is spread over it is gathered once a part of the tokens.
    """
    b, t = x.shape[:2]
    n = -(-t // max(1, most * ways(b) // b))
    times = -(-t // n)
    padded = jnp.pad(x, ((0, 0), (0, n * times - t)) + ((0, 0),) * (x.ndim - 2))
    return by_sequence(padded.reshape(b, n, times, *x.shape[2:]).swapaxes(0, 1), 1)


def joined(x: jax.Array, t: int) -> jax.Array:
    """The inverse for a number a token, [chunks, b, times] as [b, t]: what was padded goes."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)[:, :t]


def token_kl(
    params: Params,
    x: Float[Array, "b t d"],
    other_params: Params,
    other_x: Float[Array, "b t e"],
    cfg: Config,
    chunk: int = 256,
) -> Float[Array, "b t"]:
    r"""Kullback-Leibler divergence :math:`\sum_v p_v (\log p_v - \log q_v)` of the next token at each position.

    Args:
      params: the model whose distribution is p: its head is read.
      x: its residual stream after the final norm, as `hidden` returns it.
      other_params, other_x: the same of the model whose distribution is q; it has the vocabulary and the ties of `cfg`.
      cfg: the model of `params`.
      chunk: tokens whose logits are in memory at a time.

    Returns:
      Nats, float32.

    >>> import jax
    >>> from jaxprune import models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> params = models.init(jax.random.key(0), cfg)
    >>> x = models.hidden(params, jax.numpy.arange(10).reshape(2, 5), cfg)
    >>> kl = models.token_kl(params, x, params, -x, cfg)
    >>> kl.shape, bool((kl > 0).all()), bool((abs(models.token_kl(params, x, params, x, cfg)) < 1e-6).all())
    ((2, 5), True, True)
    """

    @jax.checkpoint
    def one(z):
        p, q = (jax.nn.log_softmax(head(*w, cfg), -1) for w in ((params, z[0]), (other_params, z[1])))
        return jnp.sum(jnp.exp(p) * (p - q), -1)

    return joined(jax.lax.map(one, (chunks(x, chunk), chunks(other_x, chunk))), x.shape[1])


def loss_fn(
    cfg: Config,
    *,
    remat: bool = True,
    microbatch: int | None = None,
    axis_name: str | None = None,
    chunk: int = 256,
) -> LossFn:
    """The mean next-token cross-entropy of each sequence as a function of (params, probes, tokens), float32[b] in nats.

    Args:
      cfg: the model.
      remat, microbatch, axis_name: as in `hidden`.
      chunk: tokens whose logits are in memory at a time.

    Tokens may also be given as `{"inputs": int32[b, t], "targets": int32[b, t]}`, see `sample_targets`.

    >>> import jax
    >>> from jaxprune import models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 3)
    >>> loss = models.loss_fn(cfg)
    >>> uniform = jax.tree.map(jax.numpy.zeros_like, models.init(jax.random.key(0), cfg))
    >>> losses = loss(uniform, {}, jax.numpy.zeros((2, 5), int))
    >>> losses.shape, bool(abs(losses - jax.numpy.log(64)).max() < 1e-5)
    ((2,), True)
    """

    def losses(params: Params, probes: Probes, tokens: Tokens | dict[str, jax.Array]) -> Float[Array, " b"]:
        inputs, targets = (tokens["inputs"], tokens["targets"]) if isinstance(tokens, dict) else (tokens[:, :-1], tokens[:, 1:])
        x = hidden(params, inputs, cfg, probes, remat=remat, microbatch=microbatch, axis_name=axis_name)
        return token_losses(params, x, targets, cfg, chunk).mean(-1)

    return losses


def sample_targets(params: Params, tokens: Int[Array, "b t"], cfg: Config, key: jax.Array) -> dict[str, Int[Array, "b t"]]:
    """Draws the next token of every position from the model: the labels under which squared gradients are the true Fisher.

    Args:
      params, cfg: the model.
      tokens: token ids.
      key: of the draw.

    Returns:
      `{"inputs": tokens, "targets": int32[b, t]}`, which `loss_fn` reads in place of tokens.

    Reference: Kunstner et al., `Limitations of the Empirical Fisher Approximation <https://arxiv.org/abs/1905.12558>`_, 2019,
    equation 3.

    >>> import jax
    >>> from jaxprune import models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> params, tokens = models.init(jax.random.key(0), cfg), jax.numpy.zeros((2, 5), int)
    >>> models.sample_targets(params, tokens, cfg, jax.random.key(1))["targets"].shape
    (2, 5)
    """
    x = hidden(params, tokens, cfg)
    keys = jax.random.split(key, tokens.shape[0])
    size = ways(len(keys))  # a sequence at a time on each part of the mesh

    @jax.vmap
    def draw(key, x):
        return jax.random.categorical(key, head(params, x, cfg))

    targets = jax.lax.map(lambda z: draw(*z), (keys.reshape(size, -1).swapaxes(0, 1), in_parts(x, size)))
    return dict(inputs=tokens, targets=from_parts(targets).astype(jnp.int32))


def max_logits_fn(cfg: Config, *, microbatch: int | None = None, axis_name: str | None = None, chunk: int = 8192) -> LossFn:
    r"""NIRVANA's function of the logits, :math:`\frac1V \sum_v \max_t Z_{tv}` of each sequence, float32[b].

    Args:
      cfg: the model.
      microbatch, axis_name: as in `hidden`.
      chunk: tokens of the vocabulary whose logits are in memory at a time.

    Reference: Ai et al., `NIRVANA <https://arxiv.org/abs/2509.14230>`_, 2025, as the released code computes it.

    >>> import jax
    >>> from jaxprune import models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),), tie_embeddings=True)
    >>> params, tokens = models.init(jax.random.key(0), cfg), jax.numpy.arange(10).reshape(2, 5)
    >>> whole = models.apply(params, tokens, cfg).max(1).mean(-1)
    >>> bool(abs(models.max_logits_fn(cfg, chunk=24)(params, {}, tokens) - whole).max() < 1e-5)
    True
    """

    def function(params: Params, probes: Probes, tokens: Int[Array, "b t"]) -> Float[Array, " b"]:
        x = hidden(params, tokens, cfg, probes, remat=True, microbatch=microbatch, axis_name=axis_name)
        out = params["embed"] if cfg.tie_embeddings else params["head"].T
        size = min(chunk, cfg.vocab)
        starts = jnp.arange(0, cfg.vocab - size + 1, size)

        @jax.checkpoint
        def part(x, rows):
            return capped(jnp.einsum("btd,vd->bvt", x, rows, preferred_element_type=jnp.float32).max(-1), cfg).sum(-1)

        def add(total, start):
            return total + part(x, jax.lax.dynamic_slice_in_dim(out, start, size)), None

        total, _ = jax.lax.scan(add, jnp.zeros(tokens.shape[0], jnp.float32), starts)
        if rest := cfg.vocab % size:
            total += part(x, out[-rest:])
        return total / cfg.vocab

    return function
