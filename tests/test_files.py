import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from jaxprune import _files
from jaxprune._files import atomic_folder, atomic_text
from jaxprune._json import write_json


def tree(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): p.read_text() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture
def old(tmp_path) -> Path:
    """A folder with content, as the only thing in `tmp_path`."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    return tmp_path / "out"


@pytest.mark.parametrize("stands", [False, True], ids=["new", "empty"])
def test_a_folder_appears_whole(tmp_path, stands):
    path = tmp_path / "out"
    if stands:
        path.mkdir()
    with atomic_folder(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("a")
        assert not list(path.glob("*")) and folder.parent == path.parent
    assert tree(tmp_path) == {"out/sub/a.txt": "a"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").mkdir()
    with atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_left_after_an_error(tmp_path, old, error, overwrite):
    target = old if overwrite else tmp_path / "a" / "b" / "new"
    with pytest.raises(error), atomic_folder(target, overwrite=overwrite) as folder:
        (folder / "half.txt").write_text("half")
        raise error
    assert tree(tmp_path) == {"out/old.txt": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_content_is_replaced_only_when_asked(tmp_path, old):
    with pytest.raises(FileExistsError, match="not empty; name another one, or replace it with --overwrite"):
        with atomic_folder(old):
            pytest.fail("the folder was opened")
    with atomic_folder(old, overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
        assert tree(old) == {"old.txt": "old"}
    assert tree(tmp_path) == {"out/new.txt": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_content_that_comes_while_writing_is_kept(tmp_path):
    with pytest.raises(FileExistsError, match="not empty"), atomic_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "other.txt").write_text("other")
    assert tree(tmp_path) == {"out/other.txt": "other"}


def test_the_old_folder_comes_back_when_the_rename_fails(tmp_path, old, monkeypatch):
    rename = Path.rename

    def failing(self, target):
        if self.name.startswith(".out.") and Path(target).name == "out" and not self.name.endswith(".old"):
            raise OSError(errno.EIO, "the disk broke")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="the disk broke"), atomic_folder(old, overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
    assert tree(tmp_path) == {"out/old.txt": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_or_the_working_directory_is_never_replaced(tmp_path, old, monkeypatch):
    with pytest.raises(FileExistsError, match="is a file"), atomic_folder(old / "old.txt", overwrite=True):
        pytest.fail("the file was opened")
    monkeypatch.chdir(old)
    for path in (".", tmp_path):
        with pytest.raises(FileExistsError, match="working directory"), atomic_folder(path, overwrite=True):
            pytest.fail("the folder was opened")
    assert tree(tmp_path) == {"out/old.txt": "old"}


class SafetensorError(Exception):
    """Stands for the errors of libraries that do not raise OSError."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["OSError", "words"],
)
def test_a_full_disk_is_said_in_one_line(tmp_path, error):
    with pytest.raises(OSError, match="out: the disk is full and nothing was written") as caught:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "half.txt").write_text("half")
            raise error
    assert "\n" not in str(caught.value) and caught.value.__cause__ is error
    assert not list(tmp_path.iterdir())


def test_text_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    atomic_text(path, "one\r\né")
    assert path.read_bytes() == "one\r\né".encode()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_files.os, "replace", full)
    with pytest.raises(OSError, match="the disk is full"):
        atomic_text(path, "two")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and path.read_bytes() == "one\r\né".encode()


class Pair(NamedTuple):
    a: int
    b: Path


@dataclasses.dataclass
class Settings:
    rate: float
    pair: Pair


def test_json_holds_results(tmp_path):
    value = dict(
        settings=Settings(np.float32(0.5), Pair(1, Path("x"))),
        kept={0: np.arange(2), "nested": [(np.int64(3), None, True)]},
        odd=[float("inf"), -np.inf, float("nan")],
    )
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text()) == dict(
        settings=dict(rate=0.5, pair=dict(a=1, b="x")),
        kept={"0": [0, 1], "nested": [[3, None, True]]},
        odd=["inf", "-inf", "nan"],
    )
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        write_json(tmp_path / "y.json", {"x": object()})
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
