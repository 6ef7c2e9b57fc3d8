"""Generation with a key/value cache.

A cache is `{run: {"k": [l, b, s, k, h], "v": [l, b, s, k, h]}}`, s being the tokens that it has room for. Batches of unequal
prompts are padded on the left. Positions count the padding: rotary attention and sliding windows depend on differences only.

Rotary scalings that depend on the sequence length (`dynamic`, `longrope`) take s for it, so that keys that are cached already
stay valid. Cached logits therefore equal those of `apply` on a sequence of s tokens.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxprune.models import _rope
from jaxprune.models.config import LlamaConfig
from jaxprune.models.llama import block, head, rms_norm
from jaxprune.models.types import Params

Cache: TypeAlias = dict[str, dict[str, jax.Array]]


def init_cache(cfg: LlamaConfig, b: int, length: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache with room for `length` tokens in each of `b` sequences. Runs without attention have none.

    >>> from jaxprune.models import LayerDims, LlamaConfig
    >>> from jaxprune.models.decode import init_cache
    >>> cfg = LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 48),) * 3 + (LayerDims(0, 0, 48),))
    >>> {name: run["k"].shape for name, run in init_cache(cfg, 1, 10).items()}
    {'run_0': (3, 1, 10, 2, 8)}
    """
    if b < 1 or length < 1:
        raise ValueError(f"cache: {b} sequences of {length} tokens given; both must be at least 1")
    return {
        run.name: {n: jnp.zeros((run.length, b, length, run.dims.kv_heads, cfg.head_dim), dtype) for n in "kv"}
        for run in cfg.runs
        if run.dims.kv_heads
    }


def _room(cache: Cache) -> int | None:
    return next((run["k"].shape[2] for run in cache.values()), None)


def _forward(params, tokens, start, cfg, cache, pad):
    """Logits after the last of `tokens` [b, t], which stand at positions start, start + 1, ..., and the new cache."""
    t = tokens.shape[1]
    rope = _rope.tables(cfg, start + jnp.arange(t), _room(cache) or t)
    x, cache = params["embed"][tokens], dict(cache)

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
        (x, new), _ = jax.lax.scan(layer, (x, cache.get(run.name, {})), (jnp.arange(run.length), params[run.name]))
        if run.name in cache:
            cache[run.name] = new
    return head(params, rms_norm(x[:, -1], params["norm"], cfg.norm_eps), cfg), cache


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="cache")
def prefill(
    params: Params, tokens: Int[Array, "b t"], cfg: LlamaConfig, cache: Cache, pad: Int[Array, " b"] | None = None
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
    cfg: LlamaConfig,
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


@functools.partial(jax.jit, static_argnames="greedy")
def _pick(logits, key, temperature, greedy):
    if greedy:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)


def stream(
    params: Params,
    cfg: LlamaConfig,
    prompt: Int[Array | np.ndarray, "b t"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    key: jax.Array | None = None,
    eos_ids: Sequence[int] = (),
    pad: Sequence[int] | None = None,
    length: int | None = None,
) -> Iterator[np.ndarray]:
    """Yields the next token of each sequence, int32[b], until all have ended or there are `max_new_tokens`.

    Args:
      params: the model.
      cfg: what `params` was made with.
      prompt: token ids, padded on the left where the sequences are of unequal length.
      max_new_tokens: the most tokens that a sequence gets.
      temperature: divides the logits before sampling; 0 takes the most likely token.
      key: random key, needed unless the temperature is 0.
      eos_ids: tokens that end a sequence. A sequence that has ended repeats its end token.
      pad: tokens of padding in front of each prompt; None is none.
      length: tokens that the cache has room for; None is as many as needed. One length for many prompts compiles `step` once.

    Raises:
      ValueError: an argument is out of range, or prompt and new tokens do not fit in `length`.
    """
    prompt = np.asarray(prompt, np.int32)
    _check(prompt, cfg, max_new_tokens, temperature, key, pad, length)
    b, t = prompt.shape
    cache = init_cache(cfg, b, length or t + max_new_tokens, params["embed"].dtype)
    key = jax.random.key(0) if key is None else key  # not used by the greedy choice
    return _stream(params, cfg, prompt, max_new_tokens, temperature, key, eos_ids, pad, cache)


def _stream(params, cfg, prompt, n, temperature, key, eos_ids, pad, cache):
    pad = None if pad is None else jnp.asarray(pad, jnp.int32)
    logits, cache = prefill(params, prompt, cfg, cache, pad)
    ended, t = np.zeros(len(prompt), bool), prompt.shape[1]
    token = np.zeros(len(prompt), np.int32)
    for i in range(n):
        picked = np.asarray(_pick(logits, jax.random.fold_in(key, i), temperature, temperature == 0))
        token = np.where(ended, token, picked)
        yield token
        ended |= np.isin(token, np.asarray(eos_ids, np.int32))
        if ended.all() or i + 1 == n:
            return
        logits, cache = step(params, token, t + i, cfg, cache, pad)


def _check(prompt, cfg, n, temperature, key, pad, length):
    b, t = prompt.shape
    if b < 1 or t < 1:
        raise ValueError(f"prompt: shape {(b, t)} given; at least one sequence of one token is needed")
    if prompt.min() < 0 or prompt.max() >= cfg.vocab:
        raise ValueError(f"prompt: token ids {prompt.min()} to {prompt.max()} given; the vocabulary is 0 to {cfg.vocab - 1}")
    if n < 1:
        raise ValueError(f"max_new_tokens: {n} given; it must be at least 1")
    if length is not None and t + n > length:
        raise ValueError(f"length: {length} given for a prompt of {t} and {n} new tokens; make it at least {t + n}")
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature: {temperature} given; it must be 0 (most likely token) or a positive number")
    if temperature and key is None:
        raise ValueError(f"temperature: {temperature} given without a key; pass jax.random.key(seed)")
    if pad is not None and (len(pad) != b or min(pad) < 0 or max(pad) >= t):
        raise ValueError(f"pad: {list(pad)} given; {b} numbers from 0 to {t - 1} are needed, one a sequence")


def generate(
    params: Params, cfg: LlamaConfig, prompt: Int[Array | np.ndarray, "b t"], *, max_new_tokens: int, **options: Any
) -> Int[np.ndarray, "b n"]:
    """The new tokens of each sequence, n <= `max_new_tokens`; options as in `stream`.

    >>> import jax
    >>> from jaxprune import models
    >>> from jaxprune.models import decode
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 3)
    >>> decode.generate(models.init(jax.random.key(0), cfg), cfg, jax.numpy.array([[1, 2, 3]]), max_new_tokens=4).shape
    (1, 4)
    """
    return np.stack(list(stream(params, cfg, prompt, max_new_tokens=max_new_tokens, **options)), 1)
