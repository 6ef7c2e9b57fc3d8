"""Writing that happens whole or not at all: beside the target first, then renamed into place."""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A hidden folder beside `path` to write into: it becomes `path` at the end, or goes away if anything was raised.

    Ctrl-C counts as raised; a process that is killed leaves the hidden folder and `path` as it was.

    Args:
      path: the folder to make; missing parents are made. An empty folder may stand there.
      overwrite: a folder with content may stand there. It is replaced as a whole, and only once the new one is complete.

    Yields:
      The folder to write into, on the same file system as `path`.

    Raises:
      OSError: `path` is a file, has content, or holds the working directory or the home folder; the disk is full.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> with atomic_folder(root / "model") as folder:
    ...     _ = (folder / "config.json").write_text("{}")
    >>> [str(p.relative_to(root)) for p in sorted(root.rglob("*"))]
    ['model', 'model/config.json']
    """
    path = Path(path).expanduser().resolve()
    _check_target(path, overwrite)
    made = [parent for parent in path.parents if not parent.exists()]
    beside = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        beside.mkdir(parents=True)
        yield beside
        _check_target(path, overwrite)
        _swap(beside, path)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        _remove(made)
        _raise_if_full(error, path)
        raise


@contextlib.contextmanager
def atomic_file(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A hidden path beside `path` to write a file to: it becomes `path` at the end, or goes away if anything was raised.

    Args:
      path: the file to make; missing parents are made.
      overwrite: a file may stand there; it is replaced, and only once the new one is complete.

    Yields:
      The path to write to, on the same file system as `path`.

    Raises:
      OSError: `path` is a folder, or a file that is not to be replaced; the disk is full.
    """
    path = Path(path).expanduser().resolve()
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; name a file")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: the file exists; name another one, or replace it with --overwrite")
    made = [parent for parent in path.parents if not parent.exists()]
    beside = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        _remove(made)
        _raise_if_full(error, path)
        raise


def atomic_text(path: str | Path, text: str) -> None:
    """Writes a UTF-8 text file as `atomic_bytes` does; line ends stay as they are."""
    atomic_bytes(path, text.encode())


def atomic_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file, or leaves what was there.

    Args:
      path: the file; it is replaced if it exists.
      content: its bytes.

    Raises:
      OSError: it cannot be written.
    """
    with atomic_file(path, overwrite=True) as beside:
        beside.write_bytes(content)


def _remove(made: list[Path]) -> None:
    for parent in made:
        with contextlib.suppress(OSError):
            parent.rmdir()


def _check_target(path: Path, overwrite: bool) -> None:
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path}: is a file; name a folder that is new or empty")
    if not path.exists() or not any(path.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{path}: the folder is not empty; name another one, or replace it with --overwrite")
    if any(place.is_relative_to(path) for place in (Path.cwd(), Path.home().resolve())):
        raise FileExistsError(f"{path}: holds the working directory or the home folder, so it is not overwritten; name another")


def _swap(new: Path, path: Path) -> None:
    if not path.exists():
        new.rename(path)
        return
    old = path.parent / f"{new.name}.old"
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old)


def _raise_if_full(error: BaseException, path: Path) -> None:
    """Libraries written in Rust or C++ report a full disk in words only, so those count too."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
        raise OSError(f"{path}: the disk is full and nothing was written; free some space or name another place") from error
