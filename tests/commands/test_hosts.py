"""Two processes of four devices each, on loopback: the same folders as one process makes, and refusals that both make."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxprune import folder, models

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 40
MESH = ("--mesh", "fsdp=4,tensor=2")  # both processes are needed for every matrix
LIMIT = 240  # seconds


@contextlib.contextmanager
def started(commands: list[list[list[object]]]):
    """The processes, each with its own list of commands; none is left at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    env = os.environ | dict(JAX_PLATFORMS="cpu", NPROC="16", XLA_FLAGS="--xla_force_host_platform_device_count=4")
    script = Path(__file__).with_name("together.py")
    with contextlib.ExitStack() as stack:
        found = []
        for i, mine in enumerate(commands):
            words = json.dumps([[str(word) for word in words] for words in mine])
            process = subprocess.Popen(
                [sys.executable, script, where, f"{i}/{len(commands)}", words],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
            )  # fmt: skip
            stack.callback(process.wait)
            stack.callback(process.kill)
            found.append(process)
        yield found


def together(*commands: list[list[object]]) -> list[tuple[list[int], str]]:
    """For each process the exit statuses of its commands and what it wrote to stderr."""
    with started(list(commands)) as processes:
        done = [process.communicate(timeout=LIMIT) for process in processes]
    out = []
    for text, err in done:
        last = [line for line in text.splitlines() if line.startswith("statuses ")]
        assert last, err
        out.append((json.loads(last[0].removeprefix("statuses ")), err))
    return out


@pytest.fixture
def uneven(dense, tmp_path):
    """A model with grouped query heads, whose layers are not all alike."""
    cfg = models.load(dense)[1]
    layers = (models.LayerDims(4, 2, 48), models.LayerDims(2, 3, 40))
    cfg = models.LlamaConfig(vocab=cfg.vocab, d=32, head_dim=8, layers=layers, eos_ids=cfg.eos_ids)
    params = jax.tree.map(lambda x: 3 * x, models.init(jax.random.key(0), cfg))
    models.save(tmp_path / "uneven", params, cfg, folder.load(str(dense)).tokenizer)
    return tmp_path / "uneven"


def commands(model, text, out):
    method = (
        "--method",
        "taylor",
        "--kv-multiple-of",
        2,
        "--reconstruct",
        "residual",
        "--ratio",
        0.3,
        "--samples",
        4,
        "--length",
        16,
    )
    training = ("--steps", 20, "--rank", 2, "--batch-size", 4, "--length", 16, "--save-every", 10)
    return [
        ["prune", model, "--out", out / "small", "--calibration", text, *method],
        ["recover", out / "small", "--out", out / "better", "--data", text, *training, "--json", out / "losses.json"],
    ]


def close(a, b, rtol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max()), a, b)


def test_two_processes_do_what_one_does(jaxprune, uneven, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    both = [[*words, *MESH] for words in commands(uneven, text, tmp_path / "two")]
    there = ["prune", uneven, "--out", tmp_path / "two" / "small", "--method", "random", *MESH]
    own = [["evaluate", model, "--text", text, "--window", 16, *MESH] for model in (uneven, tmp_path / "absent")]
    (first, said), (second, silent) = together([*both, there, own[0]], [*both, there, own[1]])
    assert first == second == [0, 0, 2, 2], said + silent
    assert "the folder is not empty" in said and "process 1: model" in said and "pruning ..." in said
    assert not [line for line in silent.splitlines() if line.startswith("jaxprune") or "..." in line]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["better", "losses.json", "small"]
    for words in commands(uneven, text, tmp_path / "one"):
        assert jaxprune(*words).status == 0
    scores = [dict(np.load(tmp_path / out / "small" / "scores.npz")) for out in ("two", "one")]
    close(*scores, rtol=1e-5)
    plans = [folder.read_plan(tmp_path / out / "small" / folder.RECORD).digest for out in ("two", "one")]
    assert plans[0] == plans[1]
    for name, rtol in dict(small=1e-4, better=1e-4).items():  # least squares: systems of equations
        (two, cfg), (one, same) = (models.load(tmp_path / out / name) for out in ("two", "one"))
        assert cfg == same and len(set(cfg.layers)) == 2 and not any(dims.kv_heads % 2 for dims in cfg.layers)
        close(two, one, rtol)
    losses = [
        [row["loss"] for row in json.loads((tmp_path / out / "losses.json").read_text())["losses"]] for out in ("two", "one")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_after_a_kill_of_one_process_the_other_ends_and_both_go_on_from_the_checkpoint(jaxprune, uneven, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    training = ("--steps", 60, "--rank", 2, "--batch-size", 4, "--length", 16, "--save-every", 5)

    def recover(name, *more):
        out = ("--out", tmp_path / name, "--json", tmp_path / f"{name}.json")
        return ["recover", uneven, "--data", tmp_path / "text.txt", *out, *training, *more]

    both = recover("two", *MESH)
    with started([[both], [both]]) as processes:
        until = time.monotonic() + LIMIT
        while not any(path.name.isdigit() for path in tmp_path.glob("two.training/**/*")):
            assert time.monotonic() < until and processes[0].poll() is None, processes[0].communicate()[1]
            time.sleep(0.05)
        processes[0].kill()
        said = [process.communicate(timeout=LIMIT)[1] for process in processes]
    assert processes[1].returncode and not (tmp_path / "two").exists(), said[1]

    assert "holds a checkpoint of step " in jaxprune(*recover("two")).err

    (first, said), (second, _) = together(*[[[*both, "--resume"]]] * 2)
    assert first == second == [0], said
    assert jaxprune(*recover("one")).status == 0
    losses = [json.loads((tmp_path / f"{name}.json").read_text())["losses"] for name in ("two", "one")]
    np.testing.assert_allclose(*[[row["loss"] for row in rows] for rows in losses], rtol=1e-5)


def test_a_study_of_one_process_is_refused_in_two(uneven, tmp_path):
    words = ["search", uneven, "--out", tmp_path / "found", "--strategy", "adapruner", *MESH]
    (first, said), (second, _) = together([words], [words])
    assert first == second == [2] and "take auto or evolution" in said.splitlines()[-1]


def test_what_cannot_be_is_refused_before_processes_meet(refused, dense, tmp_path):
    words = ("prune", dense, "--out", tmp_path / "out", "--distributed")
    assert "distributed: given without a mesh" in refused(*words, "127.0.0.1:1,0/2")
    for wrong in ("127.0.0.1:1", "127.0.0.1,0/2", "127.0.0.1:1,2/2", "yes"):
        assert "give auto, or HOST:PORT,I/N" in refused(*words, wrong, "--mesh", "fsdp=8")


def test_layer_by_layer_and_searching_two_processes_do_what_one_does(jaxprune, uneven, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    own = ("--calibration", text, "--samples", 8, "--length", 16)

    def all_of(out):
        shape = ("--ratio", 0.3, "--kv-multiple-of", 2)
        return [
            ["prune", uneven, "--out", out / "layerwise", *own, *shape, "--method", "wanda-sp"],
            ["sparsify", uneven, "--out", out / "zeros", *own, "--method", "sparsegpt", "--layerwise", "outliers"],
            ["search", uneven, "--out", out / "found", *own, *shape, "--fitness-samples", 8, "--generations", 1],
        ]

    both = [[*words, *MESH] for words in all_of(tmp_path / "two")]
    (first, said), (second, silent) = together(both, both)
    assert first == second == [0, 0, 0], said + silent
    for words in all_of(tmp_path / "one"):
        done = jaxprune(*words)
        assert done.status == 0, done.err
    for name in ("layerwise", "zeros"):
        (two, cfg), (one, same) = (models.load(tmp_path / out / name) for out in ("two", "one"))
        assert cfg == same
        close(two, one, 1e-3)
    for name in ("plan", "baseline"):
        two, one = ((tmp_path / out / "found" / f"{name}.json").read_text() for out in ("two", "one"))
        assert two == one
    assert sorted(p.name for p in (tmp_path / "two" / "found").iterdir()) == sorted(
        p.name for p in (tmp_path / "one" / "found").iterdir()
    )
