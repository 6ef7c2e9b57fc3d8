"""A model on a mesh of devices: which letter of the axes table goes with which axis of the mesh.

==========  ===============================================================================================
`data`      the sequences alone: each of its devices has all weights
`fsdp`      the sequences, and the residual width of every matrix: a layer is gathered when its turn comes
`tensor`    KV groups, MLP channels, inner channels of Mamba and the vocabulary
==========  ===============================================================================================

The rows of the embedding are spread over `fsdp`, too: they are looked up where they lie. A mesh always has these three axes
and has to be set (`with jax.set_mesh(mesh):`), so that activations stay with their sequences and weights travel: see
`models/_mesh.py`. What is computed from a model stays where the model is, so that only loading takes a mesh.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxprune.models import Config, axes, shapes
from jaxprune.models._layout import Place

AXES = ("data", "fsdp", "tensor")
RULES = dict(d=("fsdp",), k=("tensor",), f=("tensor",), i=("tensor",), v=("tensor",))  # axis letter -> axes of the mesh
EMBEDDING = dict(v=("tensor", "fsdp"))
UNITS = dict(k="KV groups", f="MLP channels", i="inner channels")
SIMULATE = "XLA_FLAGS=--xla_force_host_platform_device_count={n} JAX_PLATFORMS=cpu"


def sizes_of(text: str) -> dict[str, int]:
    """The axes of a mesh and their sizes; those that are not named have one device.

    Raises:
      ValueError: the text has another form.

    >>> from jaxprune import sharding
    >>> sharding.sizes_of("data=2,tensor=4")
    {'data': 2, 'fsdp': 1, 'tensor': 4}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name not in AXES or name in sizes or not number.isdecimal() or int(number) < 1:
            raise ValueError(f"mesh: {text!r} given; name {', '.join(AXES)} once each, with a size: data=2,fsdp=2,tensor=2")
        sizes[name] = int(number)
    return {name: sizes.get(name, 1) for name in AXES}


def mesh_of(text: str) -> Mesh:
    """The mesh that a text asks for, on the first devices that there are.

    Args:
      text: `data=2,fsdp=2,tensor=2`; axes that are not named have size 1.

    Raises:
      ValueError: the text has another form, or asks for more devices than there are.

    >>> from jaxprune import sharding
    >>> dict(sharding.mesh_of("data=1").shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    sizes = sizes_of(text)
    n, have = math.prod(sizes.values()), jax.device_count()
    if n > have:
        raise ValueError(
            f"mesh: {text} given, which takes {n} devices; there are {have} ({jax.devices()[0].device_kind}). Give a smaller "
            f"mesh, or simulate devices on the CPU: {SIMULATE.format(n=n)}"
        )
    auto = (AxisType.Auto,) * len(AXES)  # the compiler places what is computed
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=auto, devices=jax.devices()[:n])


def shardings(cfg: Config, mesh: Mesh, *, strict: bool = False) -> Any:
    """Where each parameter goes: a tree like `models.shapes(cfg)`.

    Args:
      cfg: the model.
      mesh: with the axes of `mesh_of`.
      strict: refuse axes that do not divide.

    Raises:
      ValueError: `strict`, and an axis of the model does not divide by that of the mesh.

    >>> from jaxprune import models, sharding
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> sharding.shardings(cfg, sharding.mesh_of("data=1"))["run_0"]["gate"].spec
    P(None, 'fsdp', 'tensor')
    """
    if strict and (notes := replicated(cfg, mesh.shape)):
        raise ValueError(f"strict sharding: {notes[0]}; choose another mesh, widths that divide, or leave out the strictness")
    letters = {run.name: {n: "l" + ax for n, ax in cfg.layer_arrays(run.dims).items()} for run in cfg.runs}
    letters |= cfg.top_arrays()  # type: ignore[arg-type]

    def one(path: Any, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        names: Any = letters
        for key in path:
            names = names[key.key]
        return NamedSharding(mesh, _spec(names, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, shapes(cfg))


def _spec(letters: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    if not set(letters) - set("ld"):  # norms, biases and shortcuts of the residual stream are on every device
        return PartitionSpec()
    rules = EMBEDDING if letters == axes.TOP["embed"] else RULES
    return PartitionSpec(*(_dividing(rules.get(a, ()), n, mesh.shape) for a, n in zip(letters, shape, strict=True)))


def _dividing(names: tuple[str, ...], n: int, sizes: Mapping[str, int]) -> tuple[str, ...] | None:
    """The first of the axes of a mesh, as many as `n` divides by."""
    while names and n % math.prod(sizes[a] for a in names):
        names = names[:-1]
    return names or None


def replicated(cfg: Config, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """What does not divide and is on every device of its mesh axis instead, one line each.

    >>> from jaxprune import models, sharding
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(3, 2, 48),) * 2)
    >>> sharding.replicated(cfg, sharding.sizes_of("fsdp=2,tensor=2"))
    ('layers 0 to 1: 3 KV groups do not divide by tensor=2; every device of that axis has all of them',)
    """
    found: list[tuple[str, str, int, tuple[str, ...]]]
    found = [("the model", "residual channels", cfg.d, RULES["d"]), ("the head", "tokens", cfg.vocab, RULES["v"])]
    found.append(("the embedding", "tokens", cfg.vocab, EMBEDDING["v"]))
    for run in cfg.runs:
        last = run.start + run.length - 1
        where = f"layer {last}" if run.length == 1 else f"layers {run.start} to {last}"
        found += [(where, UNITS[a], cfg.sizes(run.dims)[a], RULES[a]) for a in cfg.units]
    return tuple(
        f"{where}: {n} {units} do not divide by {by}; every device of that axis has all of them"
        for where, units, n, names in found
        if (by := " x ".join(f"{a}={sizes[a]}" for a in names[len(_dividing(names, n, sizes) or ()) :]))
    )


def place(cfg: Config, mesh: Mesh, *, strict: bool = False) -> Place:
    """What `models.load(..., place=)` puts arrays on their devices with: each part is read for the devices that hold it alone.

    Args:
      cfg: the model.
      mesh, strict: as in `shardings`.

    Raises:
      ValueError: as `shardings`.

    >>> import numpy as np
    >>> from jaxprune import models, sharding
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> sharding.place(cfg, sharding.mesh_of("data=1"))(("embed",), np.zeros((64, 32))).sharding.spec
    P(('tensor', 'fsdp'), None)
    """
    where = shardings(cfg, mesh, strict=strict)

    def put(path: tuple[str, ...], x: Any) -> jax.Array:
        sharding = where
        for key in path:
            sharding = sharding[key]
        return on_mesh(x, sharding)

    return put


def on_mesh(x: Any, sharding: NamedSharding) -> jax.Array:
    """An array of the host, or of a file, on a mesh: each process takes the parts of its own devices, each part once."""
    parts: dict[str, np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        if (key := str(index)) not in parts:
            parts[key] = x[index]
        return parts[key]

    return jax.make_array_from_callback(x.shape, sharding, part)
