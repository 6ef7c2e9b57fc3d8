"""Where activations lie: sequences over the axes `data` and `fsdp` of the mesh that is set with `jax.set_mesh`."""

import math

import jax
from jax.sharding import AxisType, PartitionSpec

SEQUENCES = ("data", "fsdp")


def by_sequence(x: jax.Array, axis: int = 0) -> jax.Array:
    """`x` with its axis of sequences spread over the mesh, so that it is the weights that travel and not the activations.

    Without a mesh, where the sequences do not divide, and inside `pmap` and `shard_map`, it is `x` itself.

    Args:
      x: activations, of any shape.
      axis: the axis of the sequences.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = tuple(
        a for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if a in SEQUENCES and kind == AxisType.Auto
    )
    n = math.prod(mesh.shape[a] for a in names)
    if n == 1 or x.shape[axis] % n:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * axis, names))


def in_parts(x: jax.Array, size: int) -> jax.Array:
    """`x` [b, ...] as [b / size, size, ...]: parts that a loop goes through, each spread over the whole mesh.

    A part holds every (b / size)-th sequence: neighbours would lie on one device, and the others would wait for it.
    """
    return by_sequence(x.reshape(size, -1, *x.shape[1:]).swapaxes(0, 1), 1)


def from_parts(x: jax.Array) -> jax.Array:
    """The inverse of `in_parts`."""
    return by_sequence(x.swapaxes(0, 1).reshape(-1, *x.shape[2:]))
