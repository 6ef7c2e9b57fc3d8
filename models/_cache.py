"""The model with a key/value cache.

A cache is `{run: {"k": [l, b, s, k, h], "v": [l, b, s, k, h]}}`, s being the tokens that it has room for. Batches of unequal
prompts are padded on the left. Positions count the padding: rotary attention and sliding windows depend on differences only.

Rotary scalings that depend on the sequence length (`dynamic`, `longrope`) take s for it, so that keys that are cached already
stay valid. Cached logits therefore equal those of `apply` on a sequence of s tokens.

Mamba has states instead of keys and values, see `jaxprune.models.mamba.init_cache`, and room for any number of tokens.
"""

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxprune.models import _rope, mamba
from jaxprune.models._kinds import told
from jaxprune.models.llama import block, embedded, head, stream_norm
from jaxprune.models.mamba_config import MambaConfig
from jaxprune.models.types import Config, Params

Cache: TypeAlias = dict[str, dict[str, jax.Array]]


def init_cache(cfg: Config, b: int, length: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache with room for `length` tokens in each of `b` sequences. Runs without attention have none.

    >>> from jaxprune.models import LayerDims, LlamaConfig
    >>> from jaxprune.models.decode import init_cache
    >>> cfg = LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 48),) * 3 + (LayerDims(0, 0, 48),))
    >>> {name: run["k"].shape for name, run in init_cache(cfg, 1, 10).items()}
    {'run_0': (3, 1, 10, 2, 8)}
    """
    if b < 1 or length < 1:
        raise ValueError(f"cache: {b} sequences of {length} tokens given; both must be at least 1")
    if isinstance(cfg, MambaConfig):
        return mamba.init_cache(cfg, b, dtype)
    return {
        run.name: {n: jnp.zeros((run.length, b, length, run.dims.kv_heads, cfg.sizes(run.dims)["h"]), dtype) for n in "kv"}
        for run in cfg.runs
        if run.dims.kv_heads
    }


def _room(cache: Cache) -> int | None:
    return next((run["k"].shape[2] for run in cache.values() if "k" in run), None)


def _forward(params, tokens, start, cfg, cache, pad):
    """Logits after the last of `tokens` [b, t], which stand at positions start, start + 1, ..., and the new cache."""
    t = tokens.shape[1]
    if isinstance(cfg, MambaConfig):
        return mamba.read(params, tokens, cfg, cache, None if pad is None else start + jnp.arange(t) >= pad[:, None])
    rope = _rope.tables(cfg, start + jnp.arange(t), _room(cache) or t)
    x, cache = embedded(params, tokens, cfg), dict(cache)

    def layer(carry, z):
        x, whole = carry
        i, p = z
        x, new = block(p, x, cfg, rope, {}, jax.tree.map(lambda c: c[i], whole), start, pad)
        at = (i, 0, start, 0, 0)
        rows = jax.tree.map(lambda c: jax.lax.dynamic_slice_in_dim(c, start, t, 1)[None], new)
        return (x, jax.tree.map(lambda c, r: jax.lax.dynamic_update_slice(c, r, at), whole, rows)), None

    for run in cfg.runs:
        if run.name not in params:
            continue
        (x, new), _ = jax.lax.scan(layer, (x, cache.get(run.name, {})), (jnp.arange(run.length), told(params[run.name], run)))
        if run.name in cache:
            cache[run.name] = new
    return head(params, stream_norm(x[:, -1], params["norm"], cfg), cfg), cache


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="cache")
def prefill(
    params: Params, tokens: Int[Array, "b t"], cfg: Config, cache: Cache, pad: Int[Array, " b"] | None = None
) -> tuple[Float[Array, "b v"], Cache]:
    """Reads the prompt into an empty cache.

    Args:
      params: the model.
      tokens: the prompts, padded on the left to the same length.
      cfg: what `params` was made with.
      cache: from `init_cache`; donated, so use the returned one.
      pad: tokens of padding in front of each prompt; None is none.

    Returns:
      The logits that follow each prompt, float32, and the cache.

    Raises:
      ValueError: the prompt is empty or longer than the cache.
    """
    t, room = tokens.shape[1], _room(cache)
    if t < 1:
        raise ValueError("prompt: no tokens given; at least one is needed to predict the next")
    if room is not None and t > room:
        raise ValueError(f"prompt: {t} tokens given, the cache has room for {room}; shorten the prompt or make a longer cache")
    return _forward(params, tokens, 0, cfg, cache, pad)


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="cache")
def step(
    params: Params,
    token: Int[Array, " b"],
    position: Int[Array, ""] | int,
    cfg: Config,
    cache: Cache,
    pad: Int[Array, " b"] | None = None,
) -> tuple[Float[Array, "b v"], Cache]:
    """Reads one more token of each sequence.

    Args:
      params: the model.
      token: the token at `position`.
      position: tokens in the cache so far, padding included; below its length, which a compiled function cannot check.
      cfg: what `params` was made with.
      cache: from `prefill` or `step`; donated, so use the returned one.
      pad: as in `prefill`.

    Returns:
      The logits that follow, float32, and the cache.
    """
    return _forward(params, token[:, None], position, cfg, cache, pad)
