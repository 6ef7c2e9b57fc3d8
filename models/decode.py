"""Generation, with the key/value cache of `jaxprune.models._cache`."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxprune.models._cache import Cache, init_cache, prefill, step
from jaxprune.models._mesh import on_host
from jaxprune.models.types import Config, Params

__all__ = ["Cache", "generate", "init_cache", "prefill", "step", "stream"]


@functools.partial(jax.jit, static_argnames="greedy")
def _pick(logits, key, temperature, greedy):
    if greedy:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)


def stream(
    params: Params,
    cfg: Config,
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
        picked = on_host(_pick(logits, jax.random.fold_in(key, i), temperature, temperature == 0))
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
    params: Params, cfg: Config, prompt: Int[Array | np.ndarray, "b t"], *, max_new_tokens: int, **options: Any
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
