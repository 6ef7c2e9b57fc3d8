r"""Mamba-1 (Gu and Dao, 2023) as pure functions on a tree of arrays.

A layer adds to the residual stream x what its mixer makes of the normed stream y = norm(x). With u and z the two halves of
`in_proj` y, and u after its causal convolution and SiLU, each inner channel i has n states:

.. math::
    (\delta, B, C) = W_x u, \qquad \Delta = \mathrm{softplus}(W_{dt} \delta + b_{dt}), \qquad A = -e^{A_{log}}

    h_t = e^{\Delta_t A} h_{t-1} + \Delta_t B_t u_t, \qquad
    \mathrm{mixer}_t = W_{out} \big((C_t h_t + D u_t)\, \mathrm{silu}(z_t)\big)

The states are float32 whatever the weights are. A prompt is read by `jax.lax.associative_scan` over `CHUNK` tokens at a time,
which bounds the memory; one token is one step of the recurrence.

Everything that an inner channel does is linear in its u, so a gate on u is a gate on the channel: zero removes it from
`x_proj`, from its states and from `out_proj`.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxprune.models._mesh import by_sequence
from jaxprune.models._through import through
from jaxprune.models.llama import head, linear, rms_norm
from jaxprune.models.mamba_config import MambaConfig
from jaxprune.models.types import Params, Probes

CHUNK = 16  # tokens whose states are in memory at a time; on CPUs longer chunks are slower
Cache: TypeAlias = dict[str, jax.Array]  # of one layer, or stacked by run


def init_cache(cfg: MambaConfig, b: int, dtype: Any = jnp.float32) -> dict[str, Cache]:
    """The state before the first token of each of `b` sequences, its size independent of their length.

    Per run `conv` [l, b, w - 1, i], the last inputs of the convolutions, and `state` float32[l, b, i, n].

    >>> from jaxprune.models import MambaConfig, MambaDims, mamba
    >>> cfg = MambaConfig(vocab=64, d=32, dt_rank=2, layers=(MambaDims(64),) * 3)
    >>> {name: x.shape for name, x in mamba.init_cache(cfg, 2)["run_0"].items()}
    {'conv': (3, 2, 3, 64), 'state': (3, 2, 64, 16)}
    """
    return {
        run.name: dict(
            conv=jnp.zeros((run.length, b, cfg.conv - 1, run.dims.inner), dtype),
            state=jnp.zeros((run.length, b, run.dims.inner, cfg.state), jnp.promote_types(dtype, jnp.float32)),
        )
        for run in cfg.runs
    }


def _convolved(p: dict, u: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The causal convolution of each channel, and its last inputs for the tokens that follow."""
    t, width = u.shape[1], p["conv1d"].shape[1]
    u = jnp.concatenate([before.astype(u.dtype), u], 1)
    y = sum(u[:, j : j + t] * p["conv1d"][:, j] for j in range(width))
    return y + p["conv1d_bias"] if "conv1d_bias" in p else y, u[:, t:]


def _scan(delta, a, b, c, u, state):
    """C h of each token, [b, t, i], and the last states, [b, i, n]; all float32.

    Tokens that fill the last chunk up have a time step of zero, which leaves the states as they are.
    """
    t = u.shape[1]
    size = min(CHUNK, t)

    def chunks(x):
        x = jnp.pad(x, ((0, 0), (0, -t % size), (0, 0)))
        return x.reshape(x.shape[0], -1, size, x.shape[-1]).swapaxes(0, 1)

    def after(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    @jax.checkpoint
    def chunk(state, z):
        delta, b, c, u = z
        decay, added = jnp.exp(delta[..., None] * a), (delta * u)[..., None] * b[:, :, None]
        decay, states = jax.lax.associative_scan(after, (decay, added), axis=1)
        states = states + decay * state[:, None]
        return states[:, -1], jnp.einsum("btin,btn->bti", states, c)

    state, y = jax.lax.scan(chunk, state, tuple(map(chunks, (delta, b, c, u))))
    return y.swapaxes(0, 1).reshape(u.shape[0], -1, u.shape[2])[:, :t], state


def inputs(
    p: dict,
    x: Float[Array, "b t d"],
    cfg: MambaConfig,
    gate: Float[Array, " i"] | None = None,
    cache: Cache | None = None,
    seen: Array | None = None,
) -> tuple[dict[str, jax.Array], Cache]:
    """What each matrix of a layer reads.

    Args:
      p: arrays of the layer, by name.
      x: residual stream before the layer.
      cfg: the model.
      gate: factor on each inner channel, or None.
      cache: `conv` and `state` after the tokens before `x`, or None where there are none.
      seen: bool[b, t], False for padding in front of a sequence, which leaves no trace; None is True everywhere.

    Returns:
      `in_proj`: [b, t, d], `x_proj`: [b, t, i], `dt_proj`: [b, t, r] and `out_proj`: [b, t, i]; and the new cache.

    What differs from transformers: padding is masked after the bias of `in_proj`, too, so that a padded sequence has the
    logits that it has alone.
    """
    b, dtype = x.shape[0], p["in_proj"].dtype
    y = rms_norm(x.astype(dtype), p["mixer_norm"], cfg.norm_eps)
    both = linear(p, "in_proj", y)
    both = both + p["in_proj_bias"] if "in_proj_bias" in p else both
    u, z = both[:, :, 0], both[:, :, 1]
    exact = jnp.promote_types(dtype, jnp.float32)
    if cache is None:
        width, states = p["A_log"].shape
        cache = dict(conv=jnp.zeros((b, cfg.conv - 1, width), dtype), state=jnp.zeros((b, width, states), exact))
    kept = 1 if seen is None else seen[..., None].astype(dtype)
    u, last = _convolved(p, u * kept, cache["conv"])
    u = jax.nn.silu(u) * kept
    if gate is not None:
        u = u * gate.astype(dtype)
    made = linear(p, "x_proj", u)
    low, b_t, c_t = jnp.split(made, [cfg.dt_rank, cfg.dt_rank + cfg.state], -1)
    delta = jax.nn.softplus(linear(p, "dt_proj", low).astype(exact) + p["dt_proj_bias"].astype(exact))
    b_t, c_t, wide = b_t.astype(exact), c_t.astype(exact), u.astype(exact)
    h, state = _scan(delta, -jnp.exp(p["A_log"].astype(exact)), b_t, c_t, wide, cache["state"])
    out = (h + wide * p["D"].astype(exact)) * jax.nn.silu(z.astype(exact))
    return dict(in_proj=y, x_proj=u, dt_proj=low, out_proj=out.astype(dtype)), dict(conv=last, state=state)


def block(
    p: dict,
    x: Float[Array, "b t d"],
    cfg: MambaConfig,
    gate: Float[Array, " i"] | None = None,
    cache: Cache | None = None,
    seen: Array | None = None,
) -> tuple[Float[Array, "b t d"], Cache]:
    """The residual stream after one layer, and the new cache; arguments as in `inputs`."""
    reads, cache = inputs(p, x, cfg, gate, cache, seen)
    update = linear(p, "out_proj", reads["out_proj"])
    update = update + p["out_proj_bias"] if "out_proj_bias" in p else update
    return x + update.astype(x.dtype), cache


def embedded(params: Params, tokens: Int[Array, "b t"], cfg: MambaConfig) -> Float[Array, "b t d"]:
    """The residual stream before the first layer."""
    x = params["embed"][tokens]
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if cfg.residual_in_fp32 else x


def hidden(
    params: Params,
    tokens: Int[Array, "b t"],
    cfg: MambaConfig,
    probes: Probes | None = None,
    *,
    remat: bool = False,
    microbatch: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, "b t d"]:
    """The residual stream after the final norm; arguments as in `jaxprune.models.hidden`.

    >>> import jax
    >>> from jaxprune import models
    >>> cfg = models.MambaConfig(vocab=64, d=32, dt_rank=2, layers=(models.MambaDims(64),) * 2)
    >>> models.apply(models.init(jax.random.key(0), cfg), jax.numpy.zeros((1, 5), int), cfg).shape
    (1, 5, 64)
    """

    def one(p: dict, x: jax.Array, probes: Probes) -> jax.Array:
        return block(p, x, cfg, probes.get("gates", {}).get("i"))[0]

    x = embedded(params, tokens, cfg)
    x = through(params, x, cfg, one, probes or {}, remat=remat, microbatch=microbatch, axis_name=axis_name)
    return rms_norm(by_sequence(x), params["norm"], cfg.norm_eps).astype(params["embed"].dtype)


def read(
    params: Params, tokens: Int[Array, "b t"], cfg: MambaConfig, cache: dict[str, Cache], seen: Array | None = None
) -> tuple[Float[Array, "b v"], dict[str, Cache]]:
    """Logits after the last of `tokens`, which follow those that `cache` has read, and the new cache."""

    def layer(x, z):
        return block(z[0], x, cfg, cache=z[1], seen=seen)

    x, new = embedded(params, tokens, cfg), {}
    for run in cfg.runs:
        x, new[run.name] = jax.lax.scan(layer, x, (params[run.name], cache[run.name]))
    x = rms_norm(x[:, -1], params["norm"], cfg.norm_eps).astype(params["embed"].dtype)
    return head(params, x, cfg), new
