"""Several devices on the command line: the flags, and a model that is loaded straight into its shards."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import jax

from jaxprune import _hosts, folder, sharding
from jaxprune.commands._common import flag, say
from jaxprune.models import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """Devices that the model is spread over."""

    mesh: Annotated[str | None, flag("AXIS=N,...", "one device")] = None
    """Sizes of the axes data (sequences), fsdp (sequences and weights) and tensor (heads, MLP channels, vocabulary), e.g.
    data=2,fsdp=2,tensor=2."""
    strict_sharding: bool = False
    """Refuse a mesh by which an axis of the model does not divide, instead of keeping that axis whole on every device."""

    @property
    def sizes(self) -> dict[str, int]:
        """Axis of the mesh -> devices; all 1 without a mesh.

        Raises:
          ValueError: the mesh has another form.
        """
        return sharding.sizes_of(self.mesh or "data=1")

    def multiples(self, units: tuple[str, ...], channels: int = 8, groups: int | None = None) -> dict[str, Any]:
        """What pruned widths are multiples of, as `pipeline.Settings` has it, so that they divide by the mesh.

        Args:
          units: what is pruned.
          channels: of MLPs, or of the residual stream, what the user asks for.
          groups: of KV groups; None leaves it to the mesh.
        """
        axis = "fsdp" if units == ("hidden",) else "tensor"
        return dict(
            multiple_of=math.lcm(channels, self.sizes[axis]), kv_multiple_of=self.sizes["tensor"] if groups is None else groups
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
    """Several processes, one a host, that run the same command together."""

    distributed: Annotated[str | None, flag("auto|HOST:PORT,I/N", "one process")] = None
    """auto: JAX finds the others (Cloud TPU, Slurm, Kubernetes, Open MPI). Elsewhere where the first one listens, and that this
    is process I of N. The mesh has to have all of their devices."""


@contextlib.contextmanager
def prepared(devices: Devices | None, hosts: Hosts | None) -> Iterator[None]:
    """Before anything else is done: the processes have met, and the mesh is set.

    Raises:
      ValueError: as `_hosts.start` and `set_mesh`, or a mesh that does not have the devices of all processes.
    """
    if hosts is not None and hosts.distributed is not None:
        if devices is None or devices.mesh is None:
            raise ValueError("distributed: given without a mesh; name one that has the devices of all processes, e.g. fsdp=8")
        sharding.sizes_of(devices.mesh)
        if not jax.distributed.is_initialized():  # as in a program that joined the processes and runs several commands
            _hosts.start(hosts.distributed)
        if (n := math.prod(devices.sizes.values())) != jax.device_count():
            raise ValueError(
                f"mesh: {devices.mesh} given, which takes {n} devices; the {jax.process_count()} processes have "
                f"{jax.device_count()}, and all have to be in it"
            )
    with set_mesh(devices):
        yield


@contextlib.contextmanager
def set_mesh(flags: Devices | None) -> Iterator[None]:
    """The mesh that the flags ask for is set, if there is one.

    Raises:
      ValueError: a mesh of another form, of more devices than there are, or none to be strict about.
    """
    if flags is None or flags.mesh is None:
        if flags is not None and flags.strict_sharding:
            raise ValueError("strict_sharding: given without a mesh; name one, e.g. --mesh fsdp=2,tensor=4")
        yield
        return
    with jax.set_mesh(sharding.mesh_of(flags.mesh)):
        yield


def load(flags: Devices, source: str, dtype: str | None = None, **options: Any) -> folder.Model:
    """`folder.load`, each device reading its part alone; says which axes do not divide.

    Raises:
      ValueError: as `folder.load` and `sharding.place`.
    """
    return _load(folder.load, flags, source, dtype, options)


def load_any(flags: Devices, source: str, dtype: str | None = None, **options: Any) -> folder.Model:
    """The same by `folder.load_any`."""
    return _load(folder.load_any, flags, source, dtype, options)


def _load(read: Callable[..., folder.Model], flags: Devices, source: str, dtype: str | None, options: Any) -> folder.Model:
    mesh = None if flags.mesh is None else sharding.mesh_of(flags.mesh)
    with _hosts.alike():
        model = read(source, dtype, mesh=mesh, strict=flags.strict_sharding, **options)
    check(flags, model.cfg)
    return model


def check(flags: Devices, cfg: Config) -> None:
    """Says which axes of a model do not divide by the mesh.

    Raises:
      ValueError: one does not, and the flags are strict.
    """
    for note in () if flags.mesh is None else sharding.replicated(cfg, flags.sizes):
        if flags.strict_sharding:
            raise ValueError(f"strict_sharding: {note}; choose another mesh or other widths, or leave --strict-sharding out")
        say(f"note: {note}")
