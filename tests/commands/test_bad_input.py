"""Flags and files that cannot be used: one line says what was given and what is allowed, and no file is left behind."""

import re

import pytest

from jaxprune import folder


@pytest.fixture
def prune(refused, model, tmp_path):
    """The refusal of `prune` with these flags."""
    return lambda *flags: refused("prune", model, "--out", tmp_path / "out", *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ratio", 0), "ratio: 0.0 given; allowed is between 0 and 1"),
        (("--ratio", 1), "ratio: 1.0 given"),
        (("--ratio", 1.5), "ratio: 1.5 given"),
        (("--ratio", -0.1), "ratio: -0.1 given"),
        (("--ratio", "nan"), "ratio: nan given"),
        (("--ratio", 0.99, "--method", "random"), "at most 70.0% can go; lower --ratio"),
        (("--ratio", 0.99, "--method", "random", "--units", "layers"), "which is every layer; lower --ratio"),
        (("--method", "tailor"), "method: 'tailor' given; allowed are kfac-obs, taylor, "),
        (("--layers", "3"), "layers: '3' given; give A:B"),
        (("--layers", "1:1", "--method", "random"), "layers: 1:1 given; this model has layers 0:2"),
        (("--layers", "0:3", "--method", "random"), "layers: 0:3 given; this model has layers 0:2"),
        (("--protect-first", 2, "--method", "random"), "this model has layers 0:2"),
        (("--protect-last", -1), "protect: 0 first and -1 last layers given"),
        (("--units", "heads"), "units: 'heads' given; allowed are kv, mlp, inner, layers, sublayers, hidden"),
        (("--units", "kv,layers"), "only kv and mlp go together"),
        (("--units", "hidden", "--method", "fisher"), "fisher cannot score hidden"),
        (("--steps", 0), "steps: 0 given"),
        (("--multiple-of", 0), "multiple_of: 0 given"),
        (("--max-distinct", 0), "max_distinct: 0 given"),
        (("--samples", 0), "samples 0, length 512"),
        (("--fit-samples", 0), "fit_samples: 0 given; ask for at least 1"),
        (("--fit-length", 1), "fit_length: 1 given; ask for at least 2"),
        (("--fit-samples", 8, "--method", "taylor"), "fit_samples: 8 given, but no weights are fitted; name a --reconstruct"),
        (("--reconstruct", "magic"), "reconstruct: 'magic' given; allowed are none, dense, weights, residual, admm, bias"),
        (("--ranking", "best"), "ranking: 'best' given; allowed are local, global"),
        (("--min-kept", 1), "min_kept: 1.0 given"),
        (("--candidates", 0), "candidates: 0 given"),
        (("--method", "random", "--reconstruct", "none", "--ranking", "sensitivity"), "this method reads no text"),
        (("--method", "slicegpt", "--ratio", 0.9), "ratio"),
        (("--length", 0), "samples 32, length 0"),
        (("--calibration", "nowhere.txt"), "nowhere.txt: no such file"),
        (("--calibration-sha256", "0" * 64), f"builtin: SHA-256 .* given, {'0' * 64} recorded"),
        (("--calibration-sha256", "0" * 64, "--method", "random"), "random reads no text"),
        (("--plan", "nowhere.json"), "nowhere.json: no such file; give a plan"),
        (("--units", ""), "units: '' given"),
        (("--json", "nowhere/result.json"), "json: nowhere/result.json given"),
        (
            ("--target-params", "many"),
            "target_params: 'many' given; give a positive number with one of the suffixes k, K, M, G",
        ),
        (("--target-params", "20MB"), "target_params: '20MB' given"),
        (
            ("--target-params", "1M"),
            "1.00M parameters given; the model has 31.97k parameters, so it is met already; ask for less",
        ),
        (
            ("--target-params", "10k", "--method", "random"),
            "10.00k parameters given; with these layers, units and multiples at",
        ),
        (("--target-params", "5k", "--method", "random", "--units", "layers"), "parameters stay; ask for more"),
        (("--target-params", "20k", "--ratio", 0.2), "ratio: 0.2 given together with a target"),
        (("--target-params", "20k", "--plan", "p.json"), "plan: p.json given together with a target"),
        (("--target-params", "20k", "--steps", 2), "steps: 2 given; a target is met in one step"),
        (("--target-params", "20k", "--target-flops", "1k"), "--target-params and --target-flops given; give one of them"),
        (("--target-memory", "0"), "target_memory: '0' given; give a positive number with one of the suffixes B, kB, MB"),
        (("--target-memory", "100kB", "--batch", 0), "batch: 0 given"),
        (("--target-flops", "1k", "--context", 0), "context: 0 given"),
        (("--target-flops", "1k"), "1.00k FLOPs given; with these layers"),
        (("--target-latency", "20"), "target_latency: '20' given; give a positive number with one of the suffixes us, ms, s"),
        (("--target-throughput", "fast"), "target_throughput: 'fast' given"),
    ],
)
def test_flags_of_prune(prune, flags, message):
    assert re.search(message if ".*" in message else re.escape(message), prune(*flags))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"too short", "the text has 9 tokens; 32 x 512 = 16384 were asked for"),
        (b"\xff\xfe no text", "not UTF-8 at byte 0"),
        (b"", "there is no text in it"),
    ],
)
def test_calibration_text(prune, tmp_path, content, message):
    (tmp_path / "text.txt").write_bytes(content)
    assert message in prune("--calibration", tmp_path / "text.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "a JSON list given"),
        ("{}", "not a version 1 plan"),
        ('{"version": 1, "sizes": [{"f": 48}], "keep": []}', "0 layers in `keep` and 1 in `sizes`"),
        (
            '{"version": 1, "sizes": [{"f": 48}, {"f": 48}], "keep": [{"f": [1, 1]}, {}]}',
            "layer 0: axis f: a unit is listed",
        ),
        ('{"version": 1, "sizes": [{"f": 48}, {"f": 48}], "keep": [{"f": [48]}, {}]}', "layer 0: axis f: unit 48 given"),
        ('{"version": 1, "sizes": [{"f": 48}, {"f": 40}], "keep": [{}, {}]}', "made for another model: layer 1 has {'f': 40}"),
        ('{"version": 1, "sizes": [{"f": 48}], "keep": [{}]}', "made for 1 layers, the model has 2"),
        (
            '{"version": 1, "sizes": [{"k": 2, "f": 48}, {"k": 2, "f": 48}], "keep": [{"k": [], "f": []}, {"k": [], "f": []}]}',
            "it removes every layer",
        ),
    ],
)
def test_plans(prune, tmp_path, content, message):
    (tmp_path / "plan.json").write_text(content)
    assert message in prune("--plan", tmp_path / "plan.json")


def test_output_folders(refused, model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    for command in ("run", "prune", "recover"):
        flags = ("--data", "builtin") if command == "recover" else ()
        assert f"{out}: " in (line := refused(command, model, "--out", out, *flags)) and "not empty" in line
    assert "is a file" in refused("prune", model, "--out", out / "mine.txt")
    assert "is a file" in refused("run", model, "--out", out / "mine.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"query": "a"}', "line 1: choices, gold missing"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "line 1: gold is 2; an index from 0 to 1"),
        ("no", "line 1: not JSON"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "run"])
def test_choices(refused, model, tmp_path, command, content, message):
    (tmp_path / "choice.jsonl").write_text(content)
    out = ("--out", tmp_path / "out") if command == "run" else ()
    assert message in refused(command, model, *out, "--choice", tmp_path / "choice.jsonl")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--text", "nowhere.txt"), "nowhere.txt: no such file"),
        (("--window", 1), "window: (1,) given"),
        (("--window", 64, "--max-tokens", 32), "max_tokens: 32 given, window 64 asked"),
        (("--choice", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_flags_of_evaluate(refused, model, tmp_path, flags, message):
    assert message in refused("evaluate", model, *flags)
    assert message in refused("run", model, "--out", tmp_path / "out", *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--recovery-steps", 0), "steps: 0 given"),
        (("--learning-rate", -1), "learning_rate: -1.0 given"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (("--data", "nowhere.txt"), "nowhere.txt: no such file"),
        (("--prompt", "\udcff"), "prompt: not UTF-8"),
        (("--ratio", 2), "ratio: 2.0 given"),
        (("--target-params", "0"), "target_params: '0' given"),
        (("--target-latency", "1ms", "--ratio", 0.3), "ratio: 0.3 given together with a target"),
    ],
)
def test_flags_of_run_are_checked_before_the_first_stage(refused, model, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(folder, "load", None)
    assert message in refused("run", model, "--out", tmp_path / "out", *flags)
