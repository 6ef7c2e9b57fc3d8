"""Attention of whole sequences by functions of JAX: `jax.nn.dot_product_attention`, and the splash kernel for TPUs."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from jaxprune.models._mesh import spread_names

LANES = 128  # of a TPU: the kernel's blocks are multiples of it


def whole(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, window: int | None, cap: float | None, attention: str
) -> jax.Array:
    """Attention of sequences that begin at position 0 by the function that is called `attention`; arguments as in `attend`.

    Raises:
      ValueError: that function has no cap, or does not compute in the types of the arrays.
    """
    if attention == "splash":
        return splash(q, k, v, scale, window, cap)
    if cap is not None:
        raise ValueError(
            f"attention: {attention} given, which cannot cap attention scores as the model does; use blocks, or splash on a TPU"
        )
    return dot_product(q, k, v, scale, window, attention)


def dot_product(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, window: int | None, implementation: Any) -> jax.Array:
    """`jax.nn.dot_product_attention` of sequences that begin at position 0; arguments as in `_attention.attend`.

    Raises:
      ValueError: the types of `cudnn` are not those of the arrays.
    """
    if implementation == "cudnn" and q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"attention: cudnn given for a model in {q.dtype}; load it in bfloat16, or use blocks or xla")
    heads = q.reshape(*q.shape[:2], -1, q.shape[-1])  # b t kg h
    out = jax.nn.dot_product_attention(
        heads,
        k,
        v,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return out.reshape(q.shape)


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    window: int | None,
    cap: float | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """JAX's Pallas kernel, each device of a mesh with its own sequences and KV groups; arguments as in `_attention.attend`.

    Args:
      q, k, v: of sequences that begin at position 0.
      scale, window, cap: as in `attend`.
      interpret: run the kernel's operations one by one, on any device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    auto = [a for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]

    def local(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return _splash(q, k, v, scale, window, cap, interpret)

    if not auto:
        return local(q, k, v)
    groups = "tensor" if "tensor" in auto and k.shape[2] % mesh.shape["tensor"] == 0 else None
    spec = PartitionSpec(spread_names(q.shape[0]), None, groups)
    return jax.shard_map(local, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)


def _splash(q, k, v, scale, window, cap, interpret):
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    b, t, groups, g, h = q.shape
    n = -(-t // LANES) * LANES  # queries that are added see what they like, and no query sees keys after it

    def by_head(x: jax.Array) -> jax.Array:
        return jnp.pad(x.reshape(b, t, -1, h).swapaxes(1, 2), ((0, 0), (0, 0), (0, n - t), (0, 0)))

    shape = (n, n)
    mask = library.CausalMask(shape) if window is None else library.LocalMask(shape, (window - 1, 0), 0)
    heads = library.MultiHeadMask([mask] * (groups * g))
    kernel = library.make_splash_mha(heads, head_shards=1, q_seq_shards=1, attn_logits_soft_cap=cap, interpret=interpret)
    out = jax.vmap(kernel)(by_head(q * scale), by_head(k), by_head(v))
    return out[:, :, :t].swapaxes(1, 2).reshape(q.shape)
