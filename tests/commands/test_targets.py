"""A size or a speed to reach, on the command line: what is printed and what is recorded."""

import json

import pytest

from jaxprune import _block_latency, models
from jaxprune.models import checkpoint

FAST = ("--method", "magnitude", "--multiple-of", 1)


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """Times in proportion to weights, none of them measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_block_latency, "seconds", lambda cfg, when, of=None: 1e-3 + 1e-6 * cfg.decoder_parameters)


def pruned(jaxprune, model, folder, *flags):
    done = jaxprune("prune", model, "--out", folder / "out", *FAST, *flags, "--json", folder / "out.json")
    assert done.status == 0, done.err
    return done, json.loads((folder / "out.json").read_text()), json.loads((folder / "out" / "jaxprune.json").read_text())


def test_a_size_is_printed_and_recorded(jaxprune, dense, tmp_path):
    done, result, record = pruned(jaxprune, dense, tmp_path, "--target-params", "25k")
    reached = models.count_parameters(checkpoint.read_config(tmp_path / "out"))
    assert 24_750 <= reached == result["reached, parameters"] == result["all parameters after"] <= 25_000
    assert result["target, parameters"] == 25_000 and "ratio found" in done.out
    target = record["target"]
    assert target["what"] == "parameters" and target["limit"] == 25_000 and target["cost"] == reached
    assert record["method"]["ratio"] == target["ratio"] == pytest.approx(result["ratio found"], abs=1e-6)


@pytest.mark.parametrize("flags", [("--dtype", "bfloat16"), ("--method", "slicegpt", "--samples", 2, "--length", 16)])
def test_memory_counts_the_cache(jaxprune, dense, tmp_path, flags):
    more = ("--target-memory", "50kB", "--context", 16, "--batch", 2, *flags)
    done, result, record = pruned(jaxprune, dense, tmp_path, *more)
    cfg = checkpoint.read_config(tmp_path / "out")
    each = 2 if "bfloat16" in flags else 4
    cache = 2 * 16 * 2 * cfg.head_dim * sum(dims.kv_heads for dims in cfg.layers)
    assert result["reached, bytes"] == each * (models.count_parameters(cfg) + cache) <= 50_000
    assert record["target"]["batch"] == 2 and record["target"]["context"] == 16


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_speed_is_measured_and_recorded(jaxprune, dense, tmp_path, clock, phase):
    tokens = 16 if phase == "prefill" else 1
    dense_seconds = _block_latency.seconds(checkpoint.read_config(dense), None)
    flags = ("--target-throughput", f"{tokens / dense_seconds / 0.8:.3f}", "--phase", phase, "--context", 16)
    done, result, record = pruned(jaxprune, dense, tmp_path, *flags)
    seconds = _block_latency.seconds(checkpoint.read_config(tmp_path / "out"), None)
    assert 0.95 * 0.8 * dense_seconds <= seconds <= 0.8 * dense_seconds
    assert result["measured, ms"] == round(1e3 * seconds, 3) and result["measured, tokens/s"] == round(tokens / seconds, 2)
    assert record["target"] == record["target"] | dict(what="throughput", phase=phase, measured=seconds)
    assert "delete it to measure again" in done.err and "1 of 1" in done.err
    again = jaxprune("prune", dense, "--out", tmp_path / "again", *FAST, *flags)
    assert again.status == 0 and "latencies: read from" in again.err


def test_candidates_are_compared_at_the_target(jaxprune, dense, tmp_path):
    flags = ("--method", "flap", "--samples", 2, "--length", 16, "--candidates", 2, "--target-flops", "40k", "--context", 16)
    done, result, _ = pruned(jaxprune, dense, tmp_path, *flags)
    assert "divergences" in done.err and result["reached, FLOPs a token"] <= 40_000


def test_a_run_takes_a_target(jaxprune, dense, tmp_path):
    flags = ("--data", "none", "--text", "builtin-heldout", "--window", 16, "--max-tokens", 64, "--prompt", "a")
    done = jaxprune("run", dense, "--out", tmp_path / "run", *FAST, "--target-params", "25k", *flags)
    assert done.status == 0, done.err
    assert models.count_parameters(checkpoint.read_config(tmp_path / "run" / "pruned")) <= 25_000
