"""Where activations lie: sequences over the axes `data` and `fsdp` of the mesh that is set with `jax.set_mesh`."""

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, PartitionSpec

SEQUENCES = ("data", "fsdp")


def by_sequence(x: jax.Array, axis: int = 0) -> jax.Array:
    """`x` with its axis of sequences spread over the mesh, so that it is the weights that travel and not the activations.

    Without a mesh, where the sequences do not divide, and inside `pmap` and `shard_map`, it is `x` itself.

    Args:
      x: activations, of any shape.
      axis: the axis of the sequences.
    """
    names = spread_names(x.shape[axis])
    return x if names is None else jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * axis, names))


def spread_names(n: int) -> tuple[str, ...] | None:
    """The axes of the mesh that `n` sequences are spread over, or None where `by_sequence` leaves them alone."""
    return None if ways(n) == 1 else _names()


def ways(n: int) -> int:
    """How many parts of the mesh `n` sequences are spread over: 1 where `by_sequence` leaves them alone."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = math.prod(mesh.shape[a] for a in _names())
    return 1 if n % parts else parts


def _names() -> tuple[str, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(a for a, kind in kinds if a in SEQUENCES and kind == AxisType.Auto)


def in_parts(x: jax.Array, size: int) -> jax.Array:
    """`x` [b, ...] as [b / size, size, ...]: parts that a loop goes through, each spread over the whole mesh.

    A part holds every (b / size)-th sequence: neighbours would lie on one device, and the others would wait for it.
    """
    return by_sequence(x.reshape(size, -1, *x.shape[1:]).swapaxes(0, 1), 1)


def from_parts(x: jax.Array) -> jax.Array:
    """The inverse of `in_parts`."""
    return by_sequence(x.swapaxes(0, 1).reshape(-1, *x.shape[2:]))


def on_host(x: Any, i: int | None = None) -> np.ndarray:
    """`x`, or its part `x[i]`, as an array of the host, wherever it lies.

    Where its parts lie on devices of several processes, all of them must ask for it; what is not asked for does not travel.
    """
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        x = multihost_utils.process_allgather(x if i is None else x[i], tiled=True)
        return np.asarray(x)
    return np.asarray(x) if i is None else np.asarray(x)[i]
