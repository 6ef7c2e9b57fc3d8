"""Rotary position embeddings (Su et al., 2021) in the half-rotated layout of Hugging Face, with its scalings."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.models.config import LlamaConfig

SCALINGS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "grid")  # the last is ours


def frequencies(cfg: LlamaConfig, length: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies float64[rotary_dim / 2] and the factor on cos and sin, for sequences of at most `length` tokens.

    Reference: `linear` Chen et al., 2023; `dynamic` and `yarn` Peng et al., 2023; `longrope` Ding et al., 2024;
    `llama3` Grattafiori et al., 2024, all in the parametrisation of Hugging Face transformers.
    """
    s = dict(cfg.rope_scaling)
    kind = s.get("rope_type", s.get("type", "default"))
    h, theta = cfg.rotary_dim, cfg.rope_theta
    inv = theta ** -(np.arange(0, h, 2) / h)
    if kind == "default":
        return inv, 1.0
    if kind == "linear":
        return inv / s["factor"], 1.0
    if kind == "dynamic":
        n = max(length, cfg.max_positions)
        base = theta * (s["factor"] * n / cfg.max_positions - (s["factor"] - 1)) ** (h / (h - 2))
        return base ** -(np.arange(0, h, 2) / h), 1.0
    if kind == "llama3":
        old, low, high = s["original_max_position_embeddings"], s["low_freq_factor"], s["high_freq_factor"]
        waves = 2 * np.pi / inv
        smooth = np.clip((old / waves - low) / (high - low), 0, 1)
        return (1 - smooth) * inv / s["factor"] + smooth * inv, 1.0
    if kind == "yarn":
        return _yarn(s, inv, cfg)
    if kind == "longrope":
        old = s.get("original_max_position_embeddings") or cfg.max_positions
        factor = s.get("factor") or cfg.max_positions / old
        attention = s.get("attention_factor")
        if attention is None:
            attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(old))
        return inv / np.asarray(s["long_factor"] if length > old else s["short_factor"]), attention
    raise ValueError(f"rope scaling {kind!r} given; supported are {SCALINGS}")


def _yarn(s: dict, inv: np.ndarray, cfg: LlamaConfig) -> tuple[np.ndarray, float]:
    old = s.get("original_max_position_embeddings") or cfg.max_positions
    factor = s.get("factor") or cfg.max_positions / old

    def mscale(scale: int | float, m: int | float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * m * math.log(scale) + 1.0

    attention = s.get("attention_factor")
    if attention is None:
        m, m_all = s.get("mscale"), s.get("mscale_all_dim")
        attention = mscale(factor, m) / mscale(factor, m_all) if m and m_all else mscale(factor)

    def dimension(rotations: int | float) -> float:
        return cfg.rotary_dim * math.log(old / (rotations * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))

    low, high = dimension(s.get("beta_fast") or 32.0), dimension(s.get("beta_slow") or 1.0)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, cfg.rotary_dim - 1)
    ramp = np.clip((np.arange(len(inv)) - low) / max(high - low, 0.001), 0, 1)
    return inv / factor * ramp + inv * (1 - ramp), attention


def tables(cfg: LlamaConfig, positions: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32[t, rotary_dim / 2], at int32[t] positions.

    Where layers with a window have a base of their own they are float32[2, t, rotary_dim / 2], the second being theirs.
    """
    if cfg.local_rope_theta is not None:
        plain = dataclasses.replace(cfg, local_rope_theta=None)
        local = dataclasses.replace(plain, rope_theta=cfg.local_rope_theta, rope_scaling=())
        cos, sin = zip(*(tables(one, positions, length) for one in (plain, local)), strict=True)
        return jnp.stack(cos), jnp.stack(sin)
    if dict(cfg.rope_scaling).get("rope_type") == "grid":
        return _grid(cfg, positions)
    inv, factor = frequencies(cfg, length)
    angles = positions[:, None].astype(jnp.float32) * jnp.asarray(inv, jnp.float32)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def _grid(cfg: LlamaConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rotations of image tokens in raster order: half of the pairs turn with the row, half with the column.

    `rope_scaling` has `columns` of the image and `first`, the position of its first token; tokens before it do not turn.

    Reference: Sun et al., `LlamaGen <https://arxiv.org/abs/2406.06525>`_, 2024, section 2.2, whose code multiplies the queries
    and keys of the class token by zero instead.
    """
    s, quarter = dict(cfg.rope_scaling), cfg.rotary_dim // 4
    inv = jnp.asarray(cfg.rope_theta ** -(np.arange(quarter) / quarter), jnp.float32)
    place = positions - s["first"]
    row, column = (jnp.where(place < 0, 0, x).astype(jnp.float32)[:, None] for x in jnp.divmod(place, s["columns"]))
    angles = jnp.concatenate([row * inv, column * inv], -1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the first r dimensions of `x` [b, t, ..., h], by [t, r/2]: dimensions i and i + r/2 form a pair."""
    shape = (1, cos.shape[0]) + (1,) * (x.ndim - 3) + (cos.shape[1],)
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    half = cos.shape[-1]
    a, b, rest = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), (half, 2 * half), -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1).astype(x.dtype)
