"""LLaMA (Touvron et al., 2023) as pure functions on a tree of arrays, with probes that scores are derivatives by."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxprune.models import _kinds, _rope, _taps, axes
from jaxprune.models._attention import attend
from jaxprune.models._mesh import by_sequence
from jaxprune.models._through import through
from jaxprune.models.config import LlamaConfig
from jaxprune.models.types import Config, Params, Probes

ACTIVATIONS = dict(silu=jax.nn.silu, gelu_pytorch_tanh=jax.nn.gelu)


def rms_norm(
    x: jax.Array, w: jax.Array, eps: float, gate: jax.Array | None = None, width: int | None = None, offset: bool = False
) -> jax.Array:
    """x / sqrt(sum(x^2) / n + eps) * w, with n = `width`, or the channels that `gate` keeps if that is None.

    With `offset` the factor is 1 + w, and the product is rounded once, as Gemma's is.
    """
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    n = width if width is not None else x.shape[-1] if gate is None else jnp.sum(gate)
    x32 = x32 * jax.lax.rsqrt(jnp.sum(x32 * x32, -1, keepdims=True) / n + eps)
    return (x32 * (1 + w.astype(x32.dtype))).astype(x.dtype) if offset else x32.astype(x.dtype) * w


def stream_norm(x: jax.Array, w: jax.Array, cfg: LlamaConfig, gate: jax.Array | None = None) -> jax.Array:
    """The residual stream `x`, [..., d], through the RMSNorm of the model with the array `w`, [d]; `gate` as in `rms_norm`."""
    return rms_norm(x, w, cfg.norm_eps, gate, cfg.norm_width, cfg.norm_offset)


def embedded(params: Params, tokens: Int[Array, "b t"], cfg: LlamaConfig) -> Float[Array, "b t d"]:
    """The residual stream before the first layer."""
    x = params["embed"][tokens]
    return x if cfg.embed_scale is None else x * jnp.float32(cfg.embed_scale).astype(x.dtype)


def linear(p: dict, name: str, x: jax.Array) -> jax.Array:
    """`x` times the matrix `name`, plus its low-rank adapter, if `p` has one. Biases are not added.

    The adapter `name_a`, `name_b` acts beside the matrix; of `name_kept_a`, `name_kept_b` only where the matrix is not zero.
    """
    b, t = x.shape[:2]
    rows = x.reshape(b * t, math.prod(x.shape[2:]))  # einsum over several axes: XLA transposes whole weights
    w = p[name].reshape(rows.shape[1], -1)
    if f"{name}_kept_a" in p:
        low = p[f"{name}_kept_a"].reshape(len(w), -1)
        w = w + jnp.where(w != 0, low @ p[f"{name}_kept_b"].reshape(low.shape[1], -1), 0)
    y = rows @ w
    if f"{name}_a" in p:
        low = rows @ p[f"{name}_a"].reshape(rows.shape[1], -1)
        y += low @ p[f"{name}_b"].reshape(low.shape[1], -1)
    return y.reshape(b, t, *p[name].shape[len(axes.INPUT[name]) :])


def _add_bias(p: dict, name: str, x: jax.Array) -> jax.Array:
    return x + p[f"{name}_bias"].astype(x.dtype) if f"{name}_bias" in p else x


def attention(p: dict, x: jax.Array, cfg: LlamaConfig, rope, gates: dict, cache: dict | None = None, start=0, mask_from=None):
    """What the output projection of the attention reads, [b, t, k, g, h], and the new cache; arguments as in `block`."""
    y = stream_norm(x, p["attn_norm"], cfg, gates.get("d"))
    q, k, v = (_add_bias(p, name, linear(p, name, y)) for name in "qkv")
    if cfg.qk_norm:
        q, k = (rms_norm(x, p[n], cfg.norm_eps, offset=cfg.norm_offset) for n, x in (("q_norm", q), ("k_norm", k)))
    cos, sin = _kinds.rope_of(p, rope)
    q, k = _rope.rotate(q, cos, sin), _rope.rotate(k, cos, sin)
    if cache is not None:
        k = jax.lax.dynamic_update_slice(cache["k"], k, (0, start, 0, 0))
        v = jax.lax.dynamic_update_slice(cache["v"], v, (0, start, 0, 0))
        cache = dict(k=k, v=v)
    windowed = p[_kinds.WINDOWED] if cfg.windowed else None
    if "h" in gates:  # without a pair of the query, that of the key does not matter
        both = jnp.concatenate([gates["h"], gates["h"]])
        q, v = q * both, v * both
    z = attend(q, k, v, cfg.score_scale, start, cfg.sliding_window, mask_from, windowed, cfg.score_cap)
    return z * gates["k"][:, None, None] if "k" in gates else z, cache


def mlp(p: dict, x: jax.Array, cfg: LlamaConfig, gates: dict) -> jax.Array:
    """What the down projection of the MLP reads, [b, t, f]; arguments as in `block`."""
    y = stream_norm(x, p["mlp_norm"], cfg, gates.get("d"))
    z = ACTIVATIONS[cfg.activation](_add_bias(p, "gate", linear(p, "gate", y))) * _add_bias(p, "up", linear(p, "up", y))
    return z * gates["f"] if "f" in gates else z


def project(
    p: dict, name: str, x: jax.Array, z: jax.Array | None, cfg: LlamaConfig, gates: dict, output: dict | None = None
) -> jax.Array:
    """The residual stream after a sublayer: `x + z @ p[name]` and its bias, `x` through the shortcut if there is one.

    Where `p` has the sublayer's post norm, what is added goes through it.

    Args:
      p: arrays of the layer.
      name: `o` or `down`.
      x: residual stream before the sublayer, [b, t, d].
      z: what the projection reads, or None where the sublayer is gone.
      cfg: the model.
      gates: as in `block`.
      output: axis letter -> probe of kind `output`, see `jaxprune.models.types`.
    """
    gated = (lambda y: y * gates["d"]) if "d" in gates else (lambda y: y)
    if (shortcut := axes.SHORTCUT_BESIDE[name]) in p:
        x = gated(linear(p, shortcut, x))
    if z is not None:
        update = linear(p, name, z)
        if output:
            update = _taps.second_moment(update, output["k" if name == "o" else "f"])
        update = gated(update)
        if (norm := axes.POST_NORM_BEHIND[name]) in p:
            update = stream_norm(update, p[norm], cfg, gates.get("d"))
        x = x + update
    return x + gated(p[f"{name}_bias"].astype(x.dtype)) if f"{name}_bias" in p else x


def block(
    p: dict,
    x: jax.Array,
    cfg: LlamaConfig,
    rope,
    gates: dict,
    cache: dict | None = None,
    start=0,
    mask_from=None,
    output: dict | None = None,
):
    """One decoder layer. A sublayer whose arrays are absent adds nothing but its bias; its shortcut stays.

    Args:
      p: arrays of the layer, by name, and its kind as in `_kinds` where the model has two.
      x: residual stream, [b, t, d].
      rope: cos and sin as `_rope.tables` returns them.
      gates: axis letter -> float32[units]; absent letters are all ones.
      cache: keys and values so far, {"k", "v"}: [b, s, k, h], or None to attend within `x` alone.
      start: position of `x[:, 0]`.
      mask_from: int32[b], the first key that each sequence may see (left padding), or None.
      output: axis letter -> probe of kind `output`, see `jaxprune.models.types`, or None.

    Returns:
      The new residual stream and the new cache.
    """
    gate = {a: g.astype(x.dtype) for a, g in gates.items()}
    z = None
    if "q" in p:
        z, cache = attention(p, x, cfg, rope, gate, cache, start, mask_from)
    x = project(p, "o", x, z, cfg, gate, output)
    return project(p, "down", x, mlp(p, x, cfg, gate) if "up" in p else None, cfg, gate, output), cache


def hidden(
    params: Params,
    tokens: Int[Array, "b t"],
    cfg: LlamaConfig,
    probes: Probes | None = None,
    *,
    remat: bool = False,
    microbatch: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, "b t d"]:
    """The residual stream after the final norm; arguments as in `jaxprune.models.hidden`."""
    probes = probes or {}
    first_gates = probes["gates"][0] if "gates" in probes else {}
    x = embedded(params, tokens, cfg)
    if "d" in first_gates:
        x = x * first_gates["d"].astype(x.dtype)
    rope = _rope.tables(cfg, jnp.arange(tokens.shape[1]), tokens.shape[1])

    def one(p: dict, x: jax.Array, probes: Probes) -> jax.Array:
        return block(p, x, cfg, rope, probes.get("gates", {}), output=probes.get("output"))[0]

    x = through(params, x, cfg, one, probes, remat=remat, microbatch=microbatch, axis_name=axis_name)
    return stream_norm(by_sequence(x), params["norm"], cfg, first_gates.get("d"))


def head(params: Params, x: Float[Array, "... d"], cfg: Config) -> Float[Array, "... v"]:
    """Logits, in float32; in float64 for a model that is."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if cfg.tie_embeddings:
        return capped(jnp.einsum("...d,vd->...v", x, params["embed"], preferred_element_type=dtype), cfg)
    return capped(jnp.einsum("...d,dv->...v", x, params["head"], preferred_element_type=dtype), cfg)


def capped(logits: jax.Array, cfg: Config) -> jax.Array:
    """cap * tanh(logits / cap) with the `logit_cap` of the model, if it has one."""
    cap = cfg.logit_cap if isinstance(cfg, LlamaConfig) else None
    return logits if cap is None else cap * jnp.tanh(logits / cap)
