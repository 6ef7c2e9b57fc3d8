"""`jaxprune search`: every strategy leaves a plan, a front and a picture, and reads no text but what it was given."""

import json

import numpy as np
import pytest

from jaxprune import data, folder
from jaxprune.plan import Plan

SMALL = (
    "--calibration", "builtin", "--samples", 16, "--length", 16, "--fitness-samples", 5, "--multiple-of", 4,
    "--trials", 3, "--generations", 1,
)  # fmt: skip


@pytest.fixture
def texts(monkeypatch):
    """Windows of token ids that were drawn, by source."""
    drawn: list[tuple[str, np.ndarray]] = []
    blocks = data.token_blocks

    def record(source, *args, **options):
        found = blocks(source, *args, **options)
        drawn.append((source, found.tokens))
        return found

    monkeypatch.setattr(data, "token_blocks", record)
    return drawn


@pytest.mark.parametrize(
    ("strategy", "flags"),
    [("auto", ()), ("adapruner", ("--target-params", "26k")), ("evolution", ("--equal-widths",))],
    ids=["auto", "adapruner", "evolution"],
)
def test_a_search_leaves_plans_that_prune_cuts(jaxprune, model, tmp_path, texts, strategy, flags):
    out = tmp_path / "found"
    done = jaxprune("search", model, "--out", out, "--strategy", strategy, *SMALL, *flags)
    assert done.status == 0, done.err
    assert {source for source, _ in texts} == {"builtin"} and len(texts) == 1, "search and fitness windows are one draw"
    report = json.loads((out / "pareto.json").read_text())
    points = report["points"]
    dense = next(p for p in points if p["origin"] == "dense")
    assert (out / "pareto.png").stat().st_size > 10_000
    plans = [*out.glob("plan*.json")]
    assert {p["plan"] for p in points if p.get("plan")} | {"plan.json"} == {p.name for p in plans}
    assert min(p["loss"] for p in points if p["front"]) == min(p["loss"] for p in points)
    chosen = Plan.from_json((out / "plan.json").read_text())
    assert jaxprune("prune", model, "--plan", out / "plan.json", "--out", tmp_path / "small").status == 0
    small = folder.load(str(tmp_path / "small"))
    assert [dims.ff for dims in small.cfg.layers] == [len(layer["f"]) for layer in chosen.keep]
    if strategy == "adapruner":
        found = sum(x.size for run in small.params.values() for x in (run.values() if isinstance(run, dict) else [run]))
        assert 26_000 * 0.99 <= found <= 26_000
    else:
        assert small.cfg.decoder_parameters < 0.81 * dense["decoder parameters"]
    if strategy == "evolution":
        assert len(set(small.cfg.layers)) == 1
    again = jaxprune("search", model, "--out", out, "--strategy", strategy, *SMALL, *flags)
    assert again.status == 0 and "going on" in again.err
    before = json.loads((out / "pareto.json").read_text())
    assert before["points"] == points, "a search that is complete measures nothing again"


def test_heads_that_lost_rotary_pairs_go_through_every_command(jaxprune, refused, model, tmp_path):
    out, small, tuned = tmp_path / "found", tmp_path / "small", tmp_path / "tuned"
    flags = ("--strategy", "evolution", "--attention-units", "pairs", "--ratio", 0.4)
    assert jaxprune("search", model, "--out", out, *flags, *SMALL).status == 0
    more = ("--reconstruct", "residual", "--calibration", "builtin", "--fit-samples", 8, "--fit-length", 16)
    done = jaxprune("prune", model, "--plan", out / "plan.json", "--out", small, *more)
    assert done.status == 0, done.err
    assert any(dims.pairs is not None for dims in folder.load(str(small)).cfg.layers)
    assert jaxprune("verify", model, small).status == 0
    assert "head size" in jaxprune("inspect", small).out
    text = tmp_path / "text.txt"
    text.write_text("a text to measure on, word by word. " * 40)
    assert jaxprune("recover", small, "--data", text, "--out", tuned, "--steps", 2, "--length", 16).status == 0
    assert jaxprune("evaluate", tuned, "--text", text, "--window", 32).status == 0
    assert jaxprune("generate", tuned, "--prompt", "a text", "--max-new-tokens", 3).status == 0
    assert jaxprune("export", tuned, "--to", "hf-padded", "--out", tmp_path / "padded").status == 0
    assert {dims.pairs for dims in folder.load(str(tmp_path / "padded")).cfg.layers} == {None}
    assert "have lost rotary pairs; export as hf-padded" in refused(
        "export", tuned, "--to", "gguf", "--out", tmp_path / "x.gguf"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ratio", 1.5), "ratio: 1.5 given"),
        (("--ratio", 0.3, "--target-params", "20k"), "ratio: 0.3 given together with a target"),
        (("--target-params", "1M"), "it is met already"),
        (("--target-params", "1k"), "ask for"),
        (("--fitness-samples", 1), "fitness_samples: 1 given"),
        (("--trials", 0), "trials: 0 given"),
        (("--at-once", 0), "at_once: 0 given"),
        (("--generations", -1), "generations: -1 given"),
        (("--equal-widths",), "equal_widths: auto chooses widths"),
        (("--attention-units", "pairs"), "attention_units: pairs given with --strategy auto"),
        (("--attention-units", "pairs", "--strategy", "evolution", "--for", "gguf"), "for: gguf given, whose heads have all"),
        (("--calibration", "nowhere.txt"), "nowhere.txt: no such file"),
        (("--fitness", "nowhere.txt"), "nowhere.txt: no such file"),
        (("--calibration", "self"), "name a text"),
        (("--calibration-sha256", "0" * 64), "recorded"),
        (("--layers", "0:9", "--ratio", 0.2), "this model has layers 0:2"),
        (("--ratio", 0.99, "--strategy", "evolution"), "at most"),
    ],
)
def test_flags_that_cannot_be_used(refused, model, tmp_path, flags, message):
    assert message in refused("search", model, "--out", tmp_path / "out", "--samples", 4, "--length", 16, *flags)


@pytest.mark.parametrize("flag", ["samples", "length"])
def test_no_text_at_all_is_refused(refused, model, tmp_path, flag):
    assert f"{flag}: 0 given" in refused("search", model, "--out", tmp_path / "out", f"--{flag}", 0)


def test_a_folder_of_another_search_is_refused(jaxprune, refused, model, tmp_path):
    flags = ("--strategy", "adapruner", *SMALL)
    assert jaxprune("search", model, "--out", tmp_path / "out", *flags).status == 0
    assert "other settings (ratio)" in refused("search", model, "--out", tmp_path / "out", *flags, "--ratio", 0.4)
