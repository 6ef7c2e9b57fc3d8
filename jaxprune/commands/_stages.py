"""Stages of a run: each leaves its result as a file in the run's folder, and is not repeated while that is there."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxprune import _hosts
from jaxprune._json import plain, write_json
from jaxprune.commands._common import say
from jaxprune.models._safetensors import read_json

SETTINGS = "run.json"


@contextlib.contextmanager
def opened(folder: Path, settings: dict[str, Any], *, overwrite: bool) -> Iterator[None]:
    """The folder of a run, with its settings in it; if no stage is completed, it goes away again.

    Args:
      folder: is made, or holds a run with these settings that goes on.
      settings: of the run.
      overwrite: a run with other settings may stand there; it is removed.

    Raises:
      OSError: the folder has other content.
    """
    _hosts.by_first(_make, folder, settings, overwrite)
    try:
        yield
    finally:
        if _hosts.first() and {path.name for path in folder.iterdir()} <= {SETTINGS}:
            shutil.rmtree(folder)


def _make(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    if _stands(folder, plain(settings), overwrite):
        say(f"{folder}: going on with the run that is there")
    elif folder.is_dir():
        shutil.rmtree(folder)  # empty, or to be overwritten
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS, settings)


def flags_of(args: Any) -> dict[str, Any]:
    """The flags that a run goes on with: all but where it writes and how it is computed."""
    left_out = ("output", "overwrite", "out", "hosts", "compute")
    return {name: value for name, value in dataclasses.asdict(args).items() if name not in left_out}


def kept(folder: Path) -> str | None:
    """How to go on with the run in a folder after an interruption, or None where there is none."""
    return f"{folder} is kept; go on with the same command" if (folder / SETTINGS).is_file() else None


def once(path: Path, what: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a stage: read from its file, or made and written there."""
    if _hosts.stands(path):
        say(f"{what}: done before")
        return read_json(path)
    say(f"== {what}")
    result = make()
    _hosts.by_first(write_json, path, result)
    return plain(result)


def _stands(folder: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether a run with these settings stands there."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: is a file; name a folder that is new or empty")
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    if not (folder / SETTINGS).is_file():
        raise FileExistsError(f"{folder}: not empty and not a run of jaxprune; name another folder")
    before = read_json(folder / SETTINGS)
    changed = [key for key in settings if before.get(key) != settings[key]]
    if changed and not overwrite:
        raise FileExistsError(
            f"{folder}: holds a run with other settings ({', '.join(changed)}); name another folder, or begin anew with "
            "--overwrite"
        )
    return not changed
