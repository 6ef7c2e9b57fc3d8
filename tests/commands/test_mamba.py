"""The commands that know Mamba, and one line from those that do not."""

import json

import chex
import jax
import numpy as np
import pytest

from jaxprune import folder, models, sparsify

FLAGS = ("--samples", 4, "--length", 24)


@pytest.fixture(scope="module")
def made(dense, tmp_path_factory):
    """The folder of a random Mamba with the tokenizer of `dense`."""
    tokenizer = models.load_tokenizer(dense)
    cfg = models.MambaConfig(
        vocab=len(tokenizer), d=32, dt_rank=4, state=4, layers=(models.MambaDims(48),) * 2, eos_ids=(tokenizer.eos_token_id,)
    )
    rng = np.random.default_rng(0)
    noise = lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32)  # noqa: E731
    out = tmp_path_factory.mktemp("mamba") / "mamba"
    models.save(out, jax.tree.map(noise, models.init(jax.random.key(0), cfg)), cfg, tokenizer)
    return out


def result(path):
    return json.loads(path.read_text())


def test_sparse_stopped_and_gone_on_with(made, jaxprune, tmp_path, monkeypatch):
    out, asked = tmp_path / "sparse", ("--method", "wanda", "--nm", "2:4", *FLAGS)

    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder, "save", stop)
        assert jaxprune("sparsify", made, "--out", out, *asked).status == 2
    assert [p.name for p in tmp_path.iterdir()] == ["sparse.sparsifying"]
    with monkeypatch.context() as patch:
        patch.setattr(sparsify, "_block", stop)
        assert jaxprune("sparsify", made, "--out", out, *asked).status == 0
    done = jaxprune("verify", made, out, "--length", 16, "--json", tmp_path / "v.json")
    assert done.status == 0, done
    rows = result(tmp_path / "v.json")["by matrix"]
    assert {row["matrix"]: row["most zeros"] for row in rows} == dict.fromkeys(
        ("in_proj", "x_proj", "dt_proj", "out_proj"), 0.5
    )


def test_pruned_verified_inspected_evaluated_and_continued(made, jaxprune, tmp_path):
    small = tmp_path / "small"
    done = jaxprune(
        "prune", made, "--out", small, "--method", "gate-taylor", "--ratio", 0.5, "--json", tmp_path / "p.json", *FLAGS
    )
    assert done.status == 0, done
    assert result(tmp_path / "p.json")["fraction removed"] == 0.5
    assert jaxprune("verify", made, small, "--length", 16).status == 0
    assert jaxprune("inspect", small, "--json", tmp_path / "i.json").status == 0
    seen = result(tmp_path / "i.json")
    assert [layer["inner channels removed"] for layer in seen["layers"]] == [24, 24] and seen["transformers loads it"] == "yes"
    text = ("--text", "builtin-heldout", "--window", 32, "--max-tokens", 64)
    assert jaxprune("evaluate", small, *text, "--json", tmp_path / "e.json").status == 0
    assert result(tmp_path / "e.json")["perplexity"] > 1
    assert jaxprune("generate", small, "--prompt", "a", "--max-new-tokens", 2).status == 0


@pytest.mark.parametrize("train", ["lora", "full"])
def test_recovery_learns_and_keeps_zeros(made, jaxprune, tmp_path, train):
    sparse, better = tmp_path / "sparse", tmp_path / "better"
    assert jaxprune("sparsify", made, "--out", sparse, "--method", "wanda", "--sparsity", 0.5, *FLAGS).status == 0
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 200)
    training = ("--data", tmp_path / "text.txt", "--steps", 6, "--batch-size", 4, "--length", 32, "--learning-rate", 0.01)
    done = jaxprune("recover", sparse, "--out", better, *training, "--train", train, "--json", tmp_path / "r.json")
    assert done.status == 0, done
    losses = [row["loss"] for row in result(tmp_path / "r.json")["losses"]]
    assert losses[-1] < losses[0] - 0.1
    before, after = (folder.load_any(str(path)).params["run_0"] for path in (sparse, better))
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        np.testing.assert_array_equal(before[name] == 0, after[name] == 0)
        assert (before[name] != after[name]).any()
    same = (before["A_log"] == after["A_log"]).all() and (before["conv1d"] == after["conv1d"]).all()
    assert same == (train == "lora")
    assert jaxprune("verify", made, better, "--length", 16).status == 0


def test_uneven_widths_are_announced(made, jaxprune, tmp_path):
    small = tmp_path / "small"
    done = jaxprune("prune", made, "--out", small, "--method", "magnitude", "--ranking", "global", "--multiple-of", 1)
    assert done.status == 0 and "transformers cannot load it: its layers have" in done.err, done
    assert jaxprune("verify", made, small, "--length", 16).status == 0
    assert jaxprune("export", small, "--check", "--json", tmp_path / "e.json").status == 0
    found = result(tmp_path / "e.json")
    assert found["profiles"][0]["fits"] == "no" and "equally wide" in found["reasons"][0]["why not"]


@pytest.mark.parametrize(
    "words",
    [
        ("run", "MODEL", "--out", "OUT"),
        ("recover", "MODEL", "--out", "OUT", "--data", "builtin", "--distill", "MODEL"),
        ("search", "MODEL", "--out", "OUT"),
        ("bench", "MODEL", "--out", "OUT"),
        ("export", "MODEL", "--to", "gguf", "--out", "OUT.gguf"),
        ("size", "--model-config", "MODEL"),
        ("prune", "MODEL", "--out", "OUT", "--method", "taylor", "--target-params", "10K"),
        ("evaluate", "MODEL", "--choice", "QUESTIONS"),
    ],
)
def test_other_commands_say_what_there_is(made, refused, tmp_path, words):
    (tmp_path / "q.jsonl").write_text(json.dumps(dict(query="a", choices=["b", "c"], gold=0)))
    places = dict(MODEL=made, OUT=tmp_path / "out", QUESTIONS=tmp_path / "q.jsonl")
    places["OUT.gguf"] = tmp_path / "out.gguf"
    line = refused(*(places.get(word, word) for word in words))
    assert "MambaForCausalLM" in line and "sparsify, recover, verify, inspect" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("prune", "--out", "OUT"),
            "method: kfac-obs given, which does not score the inner channels of Mamba; choose one of taylor",
        ),
        (("prune", "--out", "OUT", "--method", "taylor", "--units", "kv"), "a model of family mamba has inner"),
        (("sparsify", "--out", "OUT", "--nm", "1:6", *FLAGS), "layers.0.in_proj has 32 inputs, which 6 does not divide"),
        (("sparsify", "--out", "OUT", "--skip", "q", *FLAGS), "allowed are in_proj, x_proj, dt_proj, out_proj"),
    ],
)
def test_bad_input(made, refused, tmp_path, words, message):
    command, *rest = (tmp_path / "out" if word == "OUT" else word for word in words)
    assert message in refused(command, made, *rest)


def test_on_a_mesh_as_on_one_device(made, jaxprune, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat, and the dog sat on the cat. " * 100)
    text, training = ("--calibration", tmp_path / "text.txt"), ("--steps", 2, "--batch-size", 4, "--length", 16)
    pruning = ("--method", "taylor", "--ratio", 0.3, "--ranking", "global", *FLAGS, *text)
    found, numbers = {}, {}
    for name, mesh in dict(one=(), mesh=("--mesh", "data=2,fsdp=2,tensor=2")).items():
        small, sparse, better = (tmp_path / f"{name}-{what}" for what in ("small", "sparse", "better"))
        for words in (
            ("prune", made, "--out", small, *pruning),
            ("verify", made, small, "--length", 16),
            ("sparsify", small, "--out", sparse, "--method", "sparsegpt", *FLAGS, *text),
            ("recover", sparse, "--out", better, "--data", tmp_path / "text.txt", *training),
            ("generate", better, "--prompt", "the cat", "--max-new-tokens", 2),
            ("evaluate", better, "--text", tmp_path / "text.txt", "--window", 16, "--json", tmp_path / f"{name}.json"),
        ):
            done = jaxprune(*words, *mesh)
            assert done.status == 0, done
        found[name], numbers[name] = models.load(better), result(tmp_path / f"{name}.json")
    assert found["mesh"][1] == found["one"][1]
    chex.assert_trees_all_close(found["mesh"][0], found["one"][0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(numbers["mesh"]["perplexity"], numbers["one"]["perplexity"], rtol=1e-4)
