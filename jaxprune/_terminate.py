"""SIGTERM, by which schedulers say that a machine will be taken away: as Ctrl-C, or noted until a checkpoint can be written."""

import contextlib
import signal
from collections.abc import Callable, Iterator

from jaxprune import _hosts


@contextlib.contextmanager
def as_interrupt() -> Iterator[None]:
    """In the block SIGTERM raises `KeyboardInterrupt(signal.SIGTERM)`.

    >>> import os, signal
    >>> try:
    ...     with as_interrupt():
    ...         os.kill(os.getpid(), signal.SIGTERM)
    ... except KeyboardInterrupt as stopped:
    ...     stopped.args == (signal.SIGTERM,)
    True
    """

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """In the block SIGTERM is noted alone; after it, `KeyboardInterrupt(signal.SIGTERM)` is raised if it came.

    Yields:
      A function that says whether it came, to any of the processes: all of them have to call it equally often.
    """
    came: list[bool] = []

    def asked() -> bool:
        if _hosts.anywhere(bool(came)):
            came.append(True)
        return bool(came)

    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(True))
    try:
        yield asked
    except KeyboardInterrupt:
        if not came:
            raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if came:
        raise KeyboardInterrupt(signal.SIGTERM)
