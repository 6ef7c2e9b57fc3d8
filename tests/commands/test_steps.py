"""The commands one after another on a tiny model: what they write is what the next one needs."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

SMALL = ("--method", "taylor", "--samples", 2, "--length", 16)
KEYS = {"plan", "method", "calibration", "seed", "versions", "metrics"}


@pytest.fixture(scope="module")
def made(dense, tmp_path_factory):
    """Folders that several tests read: pruned, pruned twice, and recovered."""
    from jaxprune import cli

    root = tmp_path_factory.mktemp("made")

    def run(*words):
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(word) for word in words])
        assert stopped.value.code == 0

    run("prune", dense, "--out", root / "pruned", "--ratio", 0.5, *SMALL, "--json", root / "prune.json")
    run("prune", root / "pruned", "--out", root / "twice", "--ratio", 0.25, *SMALL)
    run(
        *("recover", root / "pruned", "--data", "builtin", "--out", root / "recovered", "--steps", 4, "--rank", 2),
        *("--batch-size", 2, "--length", 16, "--json", root / "recover.json"),
    )
    return root


def read(path):
    return json.loads(path.read_text())


def test_prune_records_what_makes_it_reproducible(made, dense):
    record, printed = read(made / "pruned" / "jaxprune.json"), read(made / "prune.json")
    assert KEYS <= record.keys()
    assert record["method"] == record["method"] | dict(name="taylor", ratio=0.5, ranking=None, units=["kv", "mlp"])
    assert record["calibration"].keys() == {"source", "sha256", "samples", "length"}
    assert record["metrics"]["fraction removed"] == printed["fraction removed"] == 0.5
    assert printed["decoder parameters after"] * 2 == printed["decoder parameters before"]
    assert record["source"] == str(dense)


def test_the_same_command_gives_the_same_plan_and_the_same_bytes(made, dense, jaxprune, tmp_path):
    record = read(made / "pruned" / "jaxprune.json")
    digest = record["calibration"]["sha256"]
    again = ("prune", dense, "--out", tmp_path / "again", "--ratio", 0.5, *SMALL, "--calibration-sha256", digest)
    assert jaxprune(*again).status == 0
    assert read(tmp_path / "again" / "jaxprune.json")["plan"] == record["plan"]
    assert weights(tmp_path / "again") == weights(made / "pruned")


def test_other_windows_of_the_text_give_another_plan(made, dense, jaxprune, tmp_path):
    assert jaxprune("prune", dense, "--out", tmp_path / "other", "--ratio", 0.5, *SMALL, "--seed", 1).status == 0
    assert read(tmp_path / "other" / "jaxprune.json")["plan"] != read(made / "pruned" / "jaxprune.json")["plan"]


@pytest.mark.parametrize("file", ["pruned/jaxprune.json", "plan.json"])
def test_a_plan_is_applied_again_to_the_same_bytes(made, dense, jaxprune, tmp_path, file):
    (made / "plan.json").write_text(json.dumps(read(made / "pruned" / "jaxprune.json")["plan"]))
    assert jaxprune("prune", dense, "--out", tmp_path / "again", "--plan", made / file).status == 0
    assert weights(tmp_path / "again") == weights(made / "pruned")
    assert (tmp_path / "again" / "config.json").read_bytes() == (made / "pruned" / "config.json").read_bytes()


def test_verify_proves_a_cut(made, dense, jaxprune, tmp_path):
    done = jaxprune("verify", dense, made / "pruned", "--length", 16, "--tensors", "--json", tmp_path / "v.json")
    result = read(tmp_path / "v.json")
    assert done.status == 0 and result["exact"] is True
    assert result["largest logit difference"] <= result["tolerance"]
    assert {row["state"] for row in result["tensors"]} == {"equal"} and len(result["tensors"]) == 21


def test_verify_goes_back_to_the_first_model_of_a_chain(made, dense, jaxprune, tmp_path):
    for model in (made / "pruned", dense):
        done = jaxprune("verify", model, made / "twice", "--length", 16, "--json", tmp_path / "v.json")
        assert done.status == 0 and read(tmp_path / "v.json")["tensors updated"] == 0


def test_hidden_channels_then_groups_are_one_plan(dense, jaxprune, tmp_path):
    narrow, narrower = tmp_path / "narrow", tmp_path / "narrower"
    first = ("prune", dense, "--out", narrow, "--method", "magnitude", "--units", "hidden", "--ratio", 0.25)
    assert jaxprune(*first).status == 0
    assert jaxprune("prune", narrow, "--out", narrower, "--method", "magnitude", "--ratio", 0.5).status == 0
    for model in (narrow, dense):
        assert jaxprune("verify", model, narrower, "--length", 16).status == 0


def test_layers_then_groups_are_one_plan(dense, jaxprune, tmp_path):
    short, shorter = tmp_path / "short", tmp_path / "shorter"
    assert jaxprune("prune", dense, "--out", short, "--method", "first-layers", "--ratio", 0.5).status == 0
    assert jaxprune("prune", short, "--out", shorter, "--method", "magnitude", "--ratio", 0.5).status == 0
    for model in (short, dense):
        assert jaxprune("verify", model, shorter, "--length", 16).status == 0


def test_verify_tells_recovery_from_damage(made, dense, jaxprune, tmp_path):
    done = jaxprune("verify", dense, made / "recovered", "--length", 16, "--json", tmp_path / "v.json")
    result = read(tmp_path / "v.json")
    assert done.status == 0 and result["tensors updated"] == 14 and result["updated by"].startswith("LoRA: q, k, v, o")

    import shutil

    from safetensors.numpy import save_file

    damaged = tmp_path / "damaged"
    shutil.copytree(made / "recovered", damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"][3] += 0.5
    save_file(tensors, damaged / "model.safetensors")
    done = jaxprune("verify", dense, damaged, "--length", 16)
    assert done.status == 1 and "undeclared update: norm differs by 0.5" in done.err


def test_recover_writes_its_losses(made):
    result, record = read(made / "recover.json"), read(made / "recovered" / "jaxprune.json")
    losses = [row["loss"] for row in result["losses"]]
    assert len(losses) == 4 and np.isfinite(losses).all() and result["last loss"] == losses[-1]
    assert record["updates"][0]["losses"] == losses and KEYS <= record.keys()
    assert record["plan"] == read(made / "pruned" / "jaxprune.json")["plan"]
    assert not (made / "recovered.training").exists()


def test_evaluate_measures(made, jaxprune, tmp_path):
    choice = tmp_path / "choice.jsonl"
    choice.write_text(json.dumps(dict(query="Which?", choices=["this", "that"], gold=0)) + "\n")
    flags = ("--text", "builtin-heldout", "--window", 32, 16, "--max-tokens", 64, "--choice", choice)
    done = jaxprune("evaluate", made / "pruned", *flags, "--json", tmp_path / "e.json")
    result = read(tmp_path / "e.json")
    assert done.status == 0 and "perplexity" in done.out
    assert result["tokens"] == 64 and result["window"] == 32 and 100 < result["perplexity"] < 1000
    assert result["perplexity_at_16"] != result["perplexity"] and result["items"] == 1
    assert result["decoder_parameters"] == 7680 and result["decode_tokens_per_second"] > 0


def test_generate_continues(made, jaxprune, tmp_path):
    command = ("generate", made / "pruned", "--prompt", "A word", "--max-new-tokens", 5, "--temperature", 1.0)
    first, again = (jaxprune(*command, "--seed", 3, "--json", tmp_path / "g.json") for _ in range(2))
    texts = read(tmp_path / "g.json")["texts"]
    assert first.status == 0 and first.out.startswith(texts["continuation"]) and texts["prompt"] == "A word"
    assert first.out.splitlines()[0] == again.out.splitlines()[0]


def test_inspect_shows_what_was_removed(made, dense, jaxprune, tmp_path):
    assert jaxprune("inspect", made / "twice", "--json", tmp_path / "i.json").status == 0
    layers = read(tmp_path / "i.json")["layers"]
    record = read(made / "twice" / "jaxprune.json")
    assert sum(row["matrix parameters"] for row in layers) == record["metrics"]["decoder parameters after"]
    assert sum(row["MLP channels removed"] for row in layers) > 0
    assert jaxprune("inspect", dense, "--json", tmp_path / "i.json").status == 0
    assert read(tmp_path / "i.json")["pruned with"] is None


def test_methods_are_listed(jaxprune, tmp_path):
    from jaxprune import methods

    assert jaxprune("methods", "--json", tmp_path / "m.json").status == 0
    rows = read(tmp_path / "m.json")["methods"]
    assert [row["method"] for row in rows] == list(methods.METHODS)
    assert {"gradients", "activations", "weights"} == {row["reads"] for row in rows}


@pytest.mark.parametrize(
    ("method", "updates"),
    [
        ("kfac-obs", ["o", "down"]),
        ("flap", ["o_bias", "down_bias"]),
        ("numerical", ["o", "down"]),
        ("shortgpt", None),
        ("sublayers", None),
    ],
)
def test_methods_that_reconstruct_or_take_whole_parts(method, updates, dense, jaxprune, tmp_path):
    small = ("--samples", 4, "--length", 32, "--multiple-of", 1)
    done = jaxprune("prune", dense, "--out", tmp_path / "out", "--ratio", 0.5, "--method", method, *small)
    assert done.status == 0, done.err
    record = read(tmp_path / "out" / "jaxprune.json")
    assert record["metrics"]["fraction removed"] == pytest.approx(0.5, abs=0.11)
    assert [update["arrays"] for update in record["updates"]] == ([updates] if updates else [])
    assert jaxprune("verify", dense, tmp_path / "out").status == 0
    assert jaxprune("generate", tmp_path / "out", "--prompt", "A word", "--max-new-tokens", 2).status == 0


def test_slicegpt_rotates_and_says_so(dense, jaxprune, tmp_path):
    words = ("--ratio", 0.2, "--method", "slicegpt", "--samples", 4, "--length", 32)
    done = jaxprune("prune", dense, "--out", tmp_path / "out", *words)
    assert done.status == 0 and "rotated" in done.err
    assert jaxprune("generate", tmp_path / "out", "--prompt", "A word", "--max-new-tokens", 2).status == 0
    refused = jaxprune("verify", dense, tmp_path / "out")
    assert refused.status == 2 and len(refused.err.splitlines()[-1]) > 20


def test_a_plan_is_cut_and_reconstructed(made, dense, jaxprune, tmp_path):
    plan = ("--plan", made / "pruned" / "jaxprune.json", "--reconstruct", "dense", "--samples", 4, "--length", 32)
    assert jaxprune("prune", dense, "--out", tmp_path / "out", *plan).status == 0
    assert read(tmp_path / "out" / "jaxprune.json")["plan"] == read(made / "pruned" / "jaxprune.json")["plan"]
    assert weights(tmp_path / "out") != weights(made / "pruned")
    assert jaxprune("verify", dense, tmp_path / "out").status == 0


def test_the_candidate_with_the_least_divergence_is_taken(dense, jaxprune, tmp_path):
    words = ("--ratio", 0.5, "--method", "nirvana", "--samples", 2, "--length", 16, "--candidates", 3)
    done = jaxprune("prune", dense, "--out", tmp_path / "out", *words)
    assert done.status == 0, done.err
    divergences = re.search(r"divergences ([\d., ]+): set (\d) is taken", done.err)
    values = [float(x) for x in divergences[1].split(",")]
    assert len(values) == 3 and values[int(divergences[2])] == min(values)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()
