"""Several processes that run one command, one a host: who writes, and refusals that all of them make alike."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxprune._files import atomic_folder

LONGEST = 2048  # bytes of a message that goes to the other processes
WAIT: dict[str, Any] = dict(shutdown_timeout_seconds=30)  # for others at the end, should one be gone


def start(text: str) -> None:
    """Joins the processes of a command, before JAX looks for devices.

    Args:
      text: `auto`, for what JAX finds by itself (Cloud TPU, Slurm, Kubernetes, Open MPI); or `HOST:PORT,I/N`: process I of N,
        the first of which listens there.

    Raises:
      ValueError: the text has another form, nothing was found, or the processes did not meet.

    >>> start("host:1234,2/2")
    Traceback (most recent call last):
    ValueError: distributed: 'host:1234,2/2' given; give auto, or HOST:PORT,I/N with I from 0 to N - 1, e.g. 10.0.0.1:1234,0/2
    """
    found = re.fullmatch(r"(.+:\d+),(\d+)/(\d+)", text)
    if text != "auto" and not (found and int(found[2]) < int(found[3])):
        raise ValueError(
            f"distributed: {text!r} given; give auto, or HOST:PORT,I/N with I from 0 to N - 1, e.g. 10.0.0.1:1234,0/2"
        )
    try:
        if found:
            jax.distributed.initialize(found[1], int(found[3]), int(found[2]), cluster_detection_method="deactivate", **WAIT)
        else:
            jax.distributed.initialize(**WAIT)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"distributed: {text} given, and the processes did not meet ({error}); auto is for Cloud TPU, Slurm, Kubernetes "
            "(pip install kubernetes) and Open MPI, elsewhere give HOST:PORT,I/N"
        ) from None


def several() -> bool:
    """Whether other processes run the same command."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that writes files and messages. Does not look for devices unless there are others."""
    return not several() or jax.process_index() == 0


def anywhere(flag: bool) -> bool:
    """Whether it is so in any process; all have to ask."""
    return flag if not several() else bool(multihost_utils.process_allgather(np.array(flag)).any())


@contextlib.contextmanager
def alike() -> Iterator[None]:
    """What one process refuses, all refuse at the end of the block, so that none waits for another that is gone.

    In the block no process may need another one.

    Raises:
      ValueError, OSError: the block raised it.
      ValueError: the block raised such an error in another process; it says in which.
    """
    if not several():
        yield
        return
    mine: ValueError | OSError | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        mine = error
    text = "" if mine is None else str(mine) or type(mine).__name__
    said = np.frombuffer(text.encode()[:LONGEST].ljust(LONGEST, b"\0"), np.uint8)
    every = [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in multihost_utils.process_allgather(said)]
    if mine is not None:
        raise mine
    if others := [f"process {i}: {text}" for i, text in enumerate(every) if text]:
        raise ValueError(others[0])


def by_first(write: Callable[..., Any], *args: Any) -> None:
    """`write(*args)` in the first process alone; what it refuses, all refuse.

    Raises:
      ValueError, OSError: as `alike`.
    """
    with alike():
        if first():
            write(*args)


def stands(path: Path) -> bool:
    """Whether the first process finds a file; all have to ask."""
    return anywhere(first() and path.is_file())


@contextlib.contextmanager
def output_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """`_files.atomic_folder` of the first process; the others get `path`, into which they write nothing.

    Raises:
      OSError: as `_files.atomic_folder`, in all processes.
    """
    with contextlib.ExitStack() as stack:
        with alike():
            out = stack.enter_context(atomic_folder(path, overwrite=overwrite)) if first() else path
        yield out
        with alike():
            stack.close()
