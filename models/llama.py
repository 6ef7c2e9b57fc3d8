"""LLaMA (Touvron et al., 2023) as pure functions on a tree of arrays, with probes that scores are derivatives by."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxprune.models import _rope, _taps, axes
from jaxprune.models._attention import attend
from jaxprune.models._how import rematerialised
from jaxprune.models._mesh import by_sequence, from_parts, in_parts
from jaxprune.models.config import LlamaConfig
from jaxprune.models.types import TAP_KINDS, Params, PerLayer, Probes


def rms_norm(x: jax.Array, w: jax.Array, eps: float, gate: jax.Array | None = None, width: int | None = None) -> jax.Array:
    """x / sqrt(sum(x^2) / n + eps) * w, with n = `width`, or the channels that `gate` keeps if that is None."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    n = width if width is not None else x.shape[-1] if gate is None else jnp.sum(gate)
    x32 = x32 * jax.lax.rsqrt(jnp.sum(x32 * x32, -1, keepdims=True) / n + eps)
    return x32.astype(x.dtype) * w


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
    y = rms_norm(x, p["attn_norm"], cfg.norm_eps, gates.get("d"), cfg.norm_width)
    q, k, v = (_add_bias(p, name, linear(p, name, y)) for name in "qkv")
    if cfg.qk_norm:
        q, k = rms_norm(q, p["q_norm"], cfg.norm_eps), rms_norm(k, p["k_norm"], cfg.norm_eps)
    q, k = _rope.rotate(q, *rope), _rope.rotate(k, *rope)
    if cache is not None:
        k = jax.lax.dynamic_update_slice(cache["k"], k, (0, start, 0, 0))
        v = jax.lax.dynamic_update_slice(cache["v"], v, (0, start, 0, 0))
        cache = dict(k=k, v=v)
    z = attend(q, k, v, cfg.head_dim**-0.5, start, cfg.sliding_window, mask_from)
    return z * gates["k"][:, None, None] if "k" in gates else z, cache


def mlp(p: dict, x: jax.Array, cfg: LlamaConfig, gates: dict) -> jax.Array:
    """What the down projection of the MLP reads, [b, t, f]; arguments as in `block`."""
    y = rms_norm(x, p["mlp_norm"], cfg.norm_eps, gates.get("d"), cfg.norm_width)
    z = jax.nn.silu(_add_bias(p, "gate", linear(p, "gate", y))) * _add_bias(p, "up", linear(p, "up", y))
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
            update = rms_norm(update, p[norm], cfg.norm_eps, gates.get("d"), cfg.norm_width)
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
      p: arrays of the layer, by name.
      x: residual stream, [b, t, d].
      rope: cos and sin, float32[t, h/2].
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


def _stack(per_layer: PerLayer | None, start: int, length: int) -> Any:
    return {} if per_layer is None else jax.tree.map(lambda *x: jnp.stack(x), *per_layer[start : start + length])


def _layer(p, x, cfg, rope, probes, microbatch, axis_name):
    taps = {kind: probes[kind] for kind in TAP_KINDS if kind in probes}
    p, squares = _taps.outer(p, taps, axis_name)

    def one(x):
        return block(_taps.inner(p, squares), x, cfg, rope, probes.get("gates", {}), output=probes.get("output"))[0]

    return _in_microbatches(one, x, 1 if squares else microbatch)


def _in_microbatches(f: Callable[[jax.Array], jax.Array], x: jax.Array, microbatch: int | None) -> jax.Array:
    """`f(x)`, so many sequences at a time; None is all of them."""
    b = x.shape[0]
    if microbatch is None or microbatch >= b:
        return f(x)
    if b % microbatch:
        raise ValueError(f"microbatch: {microbatch} given; it must divide the batch of {b} sequences")
    return from_parts(jax.lax.map(f, in_parts(x, microbatch)))


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
    """The residual stream after the final norm.

    Args:
      params: the tree of `init`.
      tokens: token ids.
      cfg: what `params` was made with.
      probes: see `jaxprune.models.types`; None is the plain model.
      remat: keep only the residual stream between layers for the backward pass and recompute the rest, see `computing`.
      microbatch: sequences that go through a layer at a time; it divides b. None is all of them. Changes memory, not results.
      axis_name: a mapped axis (`pmap`, `shard_map`) over which taps sum weight gradients before they reduce them.
    """
    probes = probes or {}
    first_gates = probes["gates"][0] if "gates" in probes else {}
    x = params["embed"][tokens]
    if "d" in first_gates:
        x = x * first_gates["d"].astype(x.dtype)
    rope = _rope.tables(cfg, jnp.arange(tokens.shape[1]), tokens.shape[1])

    for run in cfg.runs:
        arrays = params.get(run.name, {})
        if not arrays:
            continue

        def layer(x, z):
            return _layer(z[0], by_sequence(x), cfg, rope, z[1], microbatch, axis_name), None

        stacked = {kind: _stack(per_layer, run.start, run.length) for kind, per_layer in probes.items()}
        x, _ = jax.lax.scan(rematerialised(layer) if remat else layer, x, (arrays, stacked))
    return rms_norm(by_sequence(x), params["norm"], cfg.norm_eps, first_gates.get("d"), cfg.norm_width)


def head(params: Params, x: Float[Array, "... d"], cfg: LlamaConfig) -> Float[Array, "... v"]:
    """Logits, in float32; in float64 for a model that is."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if cfg.tie_embeddings:
        return jnp.einsum("...d,vd->...v", x, params["embed"], preferred_element_type=dtype)
    return jnp.einsum("...d,dv->...v", x, params["head"], preferred_element_type=dtype)


def apply(
    params: Params, tokens: Int[Array, "b t"], cfg: LlamaConfig, probes: Probes | None = None, **options: Any
) -> Float[Array, "b t v"]:
    """Logits of every position, float32; options as in `hidden`.

    >>> import jax
    >>> from jaxprune import models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 3)
    >>> params = models.init(jax.random.key(0), cfg)
    >>> models.apply(params, jax.numpy.zeros((1, 5), int), cfg).shape
    (1, 5, 64)
    """
    return head(params, hidden(params, tokens, cfg, probes, **options), cfg)
