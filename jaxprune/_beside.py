"""Beside a model: tokens, and the parameters of models that are made from it, go where its parameters lie."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxprune.models import Config, Params
from jaxprune.models._layout import Place
from jaxprune.models._mesh import SEQUENCES
from jaxprune.sharding import AXES, on_mesh, place, shardings


def home(params: Params) -> Mesh | None:
    """The mesh that parameters lie on, or None where there is no such mesh."""
    found = getattr(next(iter(jax.tree.leaves(params)), None), "sharding", None)
    mesh = found.mesh if isinstance(found, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and set(mesh.axis_names) == set(AXES) else None


def like(params: Params, cfg: Config) -> Place:
    """Puts arrays of the model `cfg` on the mesh of `params`; on the default device if they lie on none."""
    mesh = home(params)
    return (lambda _, x: jnp.asarray(x)) if mesh is None else place(cfg, mesh)


def moved(params: Params, cfg: Config, beside: Params) -> Params:
    """The parameters of the model `cfg`, on the mesh that the parameters `beside` lie on."""
    mesh = home(beside)
    return params if mesh is None else jax.device_put(params, shardings(cfg, mesh))


def shares(params: Params) -> int:
    """Number of parts that sequences are spread over where `params` lie."""
    mesh = home(params)
    return 1 if mesh is None else _devices(mesh, SEQUENCES)


def spread(params: Params, tokens: Any) -> Any:
    """Puts sequences beside the model that reads them, each device of the axes `data` and `fsdp` with its own.

    Sequences that do not divide are spread over one of the axes, or are on every device.

    Args:
      params: the model; on no mesh of ours, the tokens are returned as they are.
      tokens: a tree of arrays whose first axis is the sequence; in a process of several, each gives all of them.
    """
    mesh = home(params)
    if mesh is None:
        return tokens

    def one(x: Any) -> jax.Array:
        return on_mesh(np.asarray(x), NamedSharding(mesh, sequences(mesh, len(x))))

    return jax.tree.map(one, tokens)


def sequences(mesh: Mesh, n: int) -> PartitionSpec:
    """How the axis of `n` sequences is spread over a mesh."""
    choices = [SEQUENCES, *sorted([(a,) for a in SEQUENCES], key=lambda names: -_devices(mesh, names))]
    return PartitionSpec(next((names for names in choices if n % _devices(mesh, names) == 0), None))


def _devices(mesh: Mesh, names: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[a] for a in names)
