"""`jaxprune sparsify`, and what the commands after it do with its zeros."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxprune import folder, layer_sparsity, sparsify

FLAGS = ("--samples", 4, "--length", 24)
MATRICES = [
    f"{part}.{n}_proj.weight" for part, names in [("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))] for n in names
]


def tensors(path):
    return load_file(path / "model.safetensors")


@pytest.fixture(scope="module")
def made(dense, tmp_path_factory):
    from jaxprune import cli

    out = tmp_path_factory.mktemp("made") / "sparse"
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(x) for x in ("sparsify", dense, "--out", out, "--nm", "2:4", *FLAGS, "--json", f"{out}.json")])
    assert stopped.value.code == 0
    return out


def test_the_folder_has_the_pattern_in_the_order_of_its_files_and_the_record_says_so(made, dense):
    before, after = tensors(dense), tensors(made)
    assert before.keys() == after.keys()
    for name, w in after.items():
        if name.endswith(tuple(MATRICES)):
            assert ((w != 0).reshape(len(w), -1, 4).sum(-1) == 2).all()
        else:
            assert (w == before[name]).all()
    record = json.loads((made / "jaxprune.json").read_text())
    printed = json.loads(made.with_suffix(".json").read_text())
    assert record["method"]["name"] == "apt" and record["sparsity"]["pattern"] == dict(fraction=0.5, n=2, m=4)
    assert len(printed["matrices"]) == 14 and {m["violations"] for m in printed["matrices"].values()} == {0}
    assert {m["zeros"] for m in printed["matrices"].values()} == {0.5} and len(printed["by matrix"]) == 7
    assert sorted(p.name for p in made.parent.iterdir()) == ["sparse", "sparse.json"]


def test_verify_reports_the_pattern_and_finds_a_zero_that_is_gone(made, dense, jaxprune, tmp_path):
    done = jaxprune("verify", dense, made, "--length", 16, "--tensors", "--json", tmp_path / "v.json")
    result = json.loads((tmp_path / "v.json").read_text())
    assert done.status == 0 and result["exact"] is True and result["matrices that lost zeros"] == 0
    assert len(result["sparse"]) == 14 and all((r["zeros"], r["N:M violations"]) == (0.5, 0) for r in result["sparse"])

    damaged = shutil.copytree(made, tmp_path / "damaged")
    changed = tensors(damaged)
    w = changed["model.layers.1.mlp.up_proj.weight"]
    w[0, np.flatnonzero(w[0] == 0)[0]] = 1
    save_file(changed, damaged / "model.safetensors")
    done = jaxprune("verify", dense, damaged, "--length", 16)
    assert done.status == 1 and "sparsity lost: layers.1.up" in done.err


def test_recovery_keeps_the_zeros(made, dense, jaxprune, tmp_path):
    training = ("--steps", 2, "--rank", 2, "--batch-size", 2, "--length", 16, "--learning-rate", 0.01)
    assert jaxprune("recover", made, "--data", "builtin", "--out", tmp_path / "better", *training).status == 0
    before, after = tensors(made), tensors(tmp_path / "better")
    name = "model.layers.0.mlp.down_proj.weight"
    assert ((before[name] == 0) == (after[name] == 0)).all() and (before[name] != after[name]).any()
    assert jaxprune("verify", dense, tmp_path / "better", "--length", 16).status == 0


def test_a_pruned_model_becomes_sparse(small, model, jaxprune, tmp_path):
    out = tmp_path / "both"
    done = jaxprune("sparsify", small, "--out", out, "--method", "sparsegpt", "--sparsity", 0.3, "--skip", "q,layers.1", *FLAGS)
    assert done.status == 0, done.err
    for whole in (small, model):
        done = jaxprune("verify", whole, out, "--length", 16, "--json", tmp_path / "v.json")
        assert done.status == 0, done
    assert {row["matrix"] for row in json.loads((tmp_path / "v.json").read_text())["by matrix"]} == {
        "k", "v", "o", "gate", "up", "down",
    }  # fmt: skip


def test_a_run_that_was_stopped_goes_on(jaxprune, dense, made, tmp_path, monkeypatch):
    command = ("sparsify", dense, "--out", tmp_path / "out", "--nm", "2:4", *FLAGS)

    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder, "save", stop)
        assert jaxprune(*command).status == 2
    assert [p.name for p in tmp_path.iterdir()] == ["out.sparsifying"]
    other = jaxprune(*command, "--seed", 1)
    assert other.status == 2 and "holds a run with other settings (seed" in other.err
    monkeypatch.setattr(sparsify, "_block", stop)
    assert jaxprune(*command).status == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


@pytest.mark.parametrize("how", ["outliers", "sensitivity"])
def test_layers_with_fractions_of_their_own(jaxprune, dense, tmp_path, monkeypatch, how):
    command = ("sparsify", dense, "--method", "magnitude", "--sparsity", 0.6, "--layerwise", how, *FLAGS)
    assert jaxprune(*command, "--out", tmp_path / "whole", "--json", tmp_path / "r.json").status == 0
    record = json.loads((tmp_path / "whole" / "jaxprune.json").read_text())["sparsity"]
    low, high = sorted(record["layers"])
    assert record["layerwise"] == how and 0.52 <= low < 0.6 < high <= 0.68 and low + high == pytest.approx(1.2)
    assert json.loads((tmp_path / "r.json").read_text())["zeros, of all of them"] == pytest.approx(0.6, abs=5e-4)
    assert jaxprune("verify", dense, tmp_path / "whole", "--length", 16).status == 0

    def stop(*args, **options):
        raise KeyboardInterrupt

    again = (*command, "--out", tmp_path / "again")
    with monkeypatch.context() as patch:
        patch.setattr(sparsify, "_block", stop)
        assert jaxprune(*again).status == 2
    assert "holds a run with other settings (spread" in jaxprune(*again, "--spread", 0.1).err
    monkeypatch.setattr(layer_sparsity, "allocated", stop)
    assert jaxprune(*again).status == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--nm", "2:4", "--layerwise", "outliers"), "layerwise: outliers given with nm"),
        (("--spread", 0.1), "spread: 0.1 given; it is for --layerwise"),
        (("--sparsity", 0.95, "--layerwise", "sensitivity"), "spread: 0.08 given; with sparsity 0.95 it must be between 0 and"),
        (("--nm", "2:4", "--sparsity", 0.5), "both given"),
        (("--nm", "4:2"), "nm: '4:2' given"),
        (("--nm", "1:5"), "which 5 does not divide"),
        (("--sparsity", 1.5), "sparsity: 1.5 given"),
        (("--variant", "MM"), "joint mask needs --nm"),
        (("--skip", "head"), "skip: 'head' given"),
        (("--samples", 0), "samples: 0 given"),
        (("--damp", -1.0), "damp: -1.0 given"),
        (("--calibration", "no.txt"), "no.txt"),
    ],
)
def test_bad_input(refused, model, tmp_path, flags, message):
    assert message in refused("sparsify", model, "--out", tmp_path / "out", *flags)
