"""A full disk, Ctrl-C and a kill: nothing half-written is left, and what can go on does."""

import errno
import json
import signal
import subprocess
import sys

import pytest

from jaxprune import data, folder, pipeline, recovery

TRAINING = ("--steps", 6, "--rank", 2, "--batch-size", 2, "--length", 16, "--save-every", 1)
WORDS = "Error while serializing: I/O error: No space left on device (os error 28)"  # as safetensors says it


def raising(error):
    def stop(*args, **options):
        raise error

    return stop


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError(WORDS)])
@pytest.mark.parametrize("command", ["prune", "run"])
def test_a_full_disk(refused, model, tmp_path, monkeypatch, command, error):
    def write(place, *rest):
        (place / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(folder.checkpoints, "save", write)
    line = refused(command, model, "--out", tmp_path / "out", "--method", "random")
    assert "the disk is full and nothing was written" in line


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"]
)
def test_training_is_not_lost_when_saving_fails(jaxprune, model, tmp_path, monkeypatch, error):
    command = ("recover", model, "--out", tmp_path / "out", "--data", "builtin", *TRAINING)
    with monkeypatch.context() as patch:
        patch.setattr(folder, "save", raising(error))
        assert jaxprune(*command).status == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.training"]
    monkeypatch.setattr(data.TrainingData, "batch", raising(AssertionError("trained again")))
    assert jaxprune(*command, "--resume").status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_a_full_disk_for_checkpoints(refused, model, tmp_path, monkeypatch):
    monkeypatch.setattr(recovery.train._checkpoints, "save", raising(OSError(errno.ENOSPC, "No space left on device")))
    line = refused("recover", model, "--out", tmp_path / "out", "--data", "builtin", *TRAINING)
    assert "the disk is full" in line


@pytest.mark.parametrize(
    ("command", "module", "name"),
    [
        ("prune", folder, "load_any"),
        ("prune", data, "token_blocks"),
        ("prune", pipeline, "prune"),
        ("prune", folder, "save"),
        ("recover", data, "training_batches"),
        ("recover", recovery, "fit"),
        ("run", pipeline, "prune"),
    ],
)
def test_ctrl_c(refused, model, tmp_path, monkeypatch, command, module, name):
    monkeypatch.setattr(module, name, raising(KeyboardInterrupt()))
    flags = ("--data", "builtin", *TRAINING) if command == "recover" else ()
    line = refused(command, model, "--out", tmp_path / "out", *flags)
    assert line.startswith("jaxprune: error: interrupted")


def test_a_bug_is_not_taken_for_bad_input(model, tmp_path, monkeypatch):
    from jaxprune import cli

    monkeypatch.setattr(pipeline, "prune", raising(AssertionError("the cut is not exact")))
    with pytest.raises(AssertionError):
        cli.main(["prune", str(model), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_recovery_that_was_killed_goes_on_to_the_same_losses(jaxprune, model, tmp_path):
    command = ("recover", model, "--data", "builtin", *TRAINING)
    whole = tmp_path / "whole.json"
    assert jaxprune(*command, "--out", tmp_path / "whole", "--json", whole).status == 0

    killed = [sys.executable, "-m", "jaxprune", *map(str, command), "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(killed, stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / "killed.training"
    while not (checkpoints / "2").is_dir() and process.poll() is None:
        pass
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "killed").exists()

    assert "resume from it" in jaxprune(*command, "--out", tmp_path / "killed").err
    again = tmp_path / "again.json"
    done = jaxprune(*command, "--out", tmp_path / "killed", "--resume", "--json", again)
    assert done.status == 0 and not checkpoints.exists()
    assert json.loads(again.read_text())["losses"] == json.loads(whole.read_text())["losses"]
    assert (tmp_path / "killed" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
