"""SIGTERM, as from a scheduler: what can go on leaves a checkpoint and ends with status 0, the rest ends as after Ctrl-C."""

import json
import os
import signal
import subprocess
import sys

import pytest

from jaxprune import pipeline, sparsify
from jaxprune.commands import _bench_cell, verify

TRAINING = ("--rank", 2, "--batch-size", 2, "--length", 16, "--save-every", 1000)


def terminated(*args, **options):
    os.kill(os.getpid(), signal.SIGTERM)


def test_training_writes_a_checkpoint_and_goes_on_to_the_same_losses(jaxprune, model, tmp_path):
    command = [*map(str, ("recover", model, "--data", "builtin", "--steps", 40, *TRAINING))]
    out, checkpoints = tmp_path / "stopped", tmp_path / "stopped.training"
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxprune", *command, "--out", str(out)], stderr=subprocess.PIPE, text=True
    )
    try:
        while not checkpoints.is_dir() and process.poll() is None:
            pass
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert err.splitlines()[-1] == f"jaxprune: stopped by SIGTERM; {checkpoints} is kept; go on with --resume"
    (done,) = [int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal()]
    assert done < 40 and not out.exists()
    losses = []
    for place, more in ((out, ["--resume"]), (tmp_path / "whole", [])):
        file = tmp_path / f"{place.name}.json"
        assert jaxprune(*command, "--out", place, "--json", file, *more).status == 0
        losses.append(json.loads(file.read_text())["losses"])
    assert losses[0] == losses[1] and not checkpoints.exists()


def test_sparse_layers_stay(jaxprune, model, tmp_path, monkeypatch):
    command = ("sparsify", model, "--out", tmp_path / "out", "--method", "magnitude", "--samples", 2, "--length", 16)
    write = sparsify.write_block
    with monkeypatch.context() as patch:
        patch.setattr(sparsify, "write_block", lambda *args: (write(*args), terminated()))
        done = jaxprune(*command)
    assert done.status == 0 and "out.sparsifying is kept; go on with the same command" in done.err
    assert (tmp_path / "out.sparsifying" / "layer_0.safetensors").is_file() and not (tmp_path / "out").exists()
    assert jaxprune(*command).status == 0 and not (tmp_path / "out.sparsifying").exists()


@pytest.mark.parametrize(
    ("command", "module", "name"), [("run", verify, "run"), ("bench", _bench_cell, "apart"), ("search", pipeline, "batches")]
)
def test_runs_keep_what_is_done(jaxprune, model, tmp_path, monkeypatch, command, module, name):
    flags = dict(
        run=("--method", "random", "--data", "none", "--window", 16, "--max-tokens", 64),
        bench=("--methods", "random", "--window", 16, "--max-tokens", 64),
        search=("--samples", 2, "--length", 16, "--fitness-samples", 2),
    )[command]
    out = tmp_path / "out"
    if command != "run":  # of which the first stage is done before
        real, calls = getattr(module, name), []

        def second(*args, **options):
            calls.append(terminated() if calls else None)
            return real(*args, **options)

        monkeypatch.setattr(module, name, second)
    else:
        monkeypatch.setattr(module, name, terminated)
    done = jaxprune(command, model, "--out", out, *flags)
    assert done.status == 0, done
    assert f"{out} is kept; go on with the same command" in done.err and (out / "run.json").is_file()


def test_pruning_ends_as_after_ctrl_c(refused, model, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "prune", terminated)
    assert "interrupted" in refused("prune", model, "--out", tmp_path / "out")
