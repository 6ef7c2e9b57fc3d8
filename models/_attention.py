"""Causal attention of grouped query heads, in blocks of queries whose scores stay in the cache of a CPU core."""

import functools

import jax
import jax.numpy as jnp

from jaxprune.models import _kernels
from jaxprune.models._how import how

BLOCKS, MULTIPLE = 8, 64  # at most so many blocks, of a multiple of so many queries


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    start: int | jax.Array,
    window: int | None,
    mask_from: jax.Array | None,
    windowed: jax.Array | None = None,
    cap: float | None = None,
) -> jax.Array:
    """softmax(q k^T * scale) v over the keys up to each query. A block skips keys that none of its queries sees.

    Whole sequences, whose `start` is the integer 0 and that have no `mask_from`, go to what `computing` names instead.

    Args:
      q: [b, t, k, g, h], at positions start, start + 1, ...
      k, v: [b, s, k, h], at positions 0, 1, ...
      scale: factor on the scores.
      start: position of the first query. Keys can be skipped only if it is a Python integer.
      window: a query sees at most this many last keys, or None.
      mask_from: int32[b], the first key that each sequence may see, or None.
      windowed: bool[], does the window hold here? None is that it does. No key is skipped then.
      cap: scores s become `cap * tanh(s / cap)`, or None.

    Raises:
      ValueError: a cap, and a function of JAX that has none.

    Returns:
      [b, t, k, g, h].
    """
    t, s = q.shape[1], k.shape[1]
    static = isinstance(start, int)
    if windowed is not None and (window is None or (static and start + t <= window)):
        window = windowed = None  # it hides nothing
    if how().attention != "blocks" and static and start == 0 and mask_from is None:
        k, v = k[:, :t], v[:, :t]  # a cache has room for more
        if windowed is None:
            return _kernels.whole(q, k, v, scale, window, cap, how().attention)
        kinds = [functools.partial(_kernels.whole, q, k, v, scale, w, cap, how().attention) for w in (window, None)]
        return jax.lax.cond(windowed, *kinds)
    size = -(-t // (BLOCKS * MULTIPLE)) * MULTIPLE
    q, k, v = q.transpose(0, 2, 3, 1, 4), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # b k g t h, b k s h
    if not static:  # decoding: without the barrier XLA fuses the transposition into a slow product where there is one group
        k, v = jax.lax.optimization_barrier((k, v))
    out = []
    for first in range(0, t, size):
        last = min(first + size, t)
        low = max(start + first - window + 1, 0) if static and window is not None and windowed is None else 0
        high = min(start + last, s) if static else s
        positions, keys = start + jnp.arange(first, last)[:, None], jnp.arange(low, high)
        seen = keys <= positions  # t s
        if window is not None:
            near = keys > positions - window
            seen &= near if windowed is None else near | ~windowed
        if mask_from is not None:
            seen = seen[None] & (keys >= mask_from[:, None])[:, None]  # b t s
            seen = seen[:, None, None]
        out.append(_softmax_times(q[:, :, :, first:last], k[:, :, low:high], v[:, :, low:high], scale, cap, seen))
    return jnp.concatenate(out, 3).transpose(0, 3, 1, 2, 4)


def _softmax_times(q, k, v, scale, cap, seen):
    """[b, k, g, t, h]. The division by the sum of the exponentials follows the product with `v`, which is smaller."""
    b, groups, g, t, h = q.shape
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bknh,bksh->bkns", q.reshape(b, groups, g * t, h), k, preferred_element_type=dtype)
    scores = scale * scores.reshape(b, groups, g, t, -1)
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    z = jnp.einsum("bkns,bksh->bknh", weights.astype(v.dtype).reshape(b, groups, g * t, -1), v)
    return (z.reshape(q.shape) / total).astype(v.dtype)
