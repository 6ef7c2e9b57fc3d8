"""Folders of the profiles hf, hf-padded and hf-custom in the installed transformers: 5 here, 4 in `make test-transformers-4`.

They are written by another process, which always has the version that the library itself needs.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
WRITER = Path(__file__).parent / "write_folders.py"
TEXTS = ("the quick <x>  fox .</s>", " héllo\n\n你好 ", "")
IDS = ([262, 290, 223], 0)


def names(profile: str) -> list[str]:
    spec = importlib.util.spec_from_file_location("write_folders", WRITER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [f"{profile}/{name}" for profile in [profile] for name in module.PROFILES[profile][1]]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("written") / "folders"
    done = subprocess.run(
        [sys.executable, str(WRITER), str(out)],
        env=os.environ | dict(PYTHONPATH=str(ROOT), JAX_DISABLE_MOST_OPTIMIZATIONS="1", XLA_FLAGS=""),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def ours(written):
    return dict(np.load(written / "ours.npz"))
