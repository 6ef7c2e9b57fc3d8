"""Commands on what `prune` wrote and someone else changed."""

import json
import shutil

import pytest


@pytest.fixture
def edit(small):
    """Replaces keys of the pruned model's record."""
    path = small / "jaxprune.json"
    record = json.loads(path.read_text())

    def run(**changes):
        path.write_text(json.dumps({k: v for k, v in (record | changes).items() if v != "absent"}))

    run.plan = record["plan"]
    return run


def test_a_folder_without_record(refused, model):
    assert "no jaxprune.json, so there is no plan to verify" in refused("verify", model, model)


@pytest.mark.parametrize("content", ["{", "[]", "{}", "\udcff"])
def test_a_record_that_is_damaged(refused, model, small, tmp_path, content):
    (small / "jaxprune.json").write_bytes(content.encode(errors="surrogateescape"))
    for command in (("verify", model, small), ("inspect", small), ("prune", small, "--out", tmp_path / "out")):
        assert f"{small / 'jaxprune.json'}: " in refused(*command)


@pytest.mark.parametrize(
    "changes",
    [
        dict(plan="absent"),
        dict(method="taylor"),
        dict(source=None),
        dict(updates="absent"),
        dict(updates=[{}]),
        dict(before=5),
        dict(before=dict(plan={})),
        dict(plan=dict(version=1, sizes=[{"f": 48}], keep=[{"f": [48]}])),
    ],
)
def test_a_record_with_malformed_parts(refused, model, small, edit, changes):
    edit(**changes)
    for command in (("verify", model, small), ("inspect", small)):
        assert f"{small / 'jaxprune.json'}: " in refused(*command)


def test_a_record_of_another_model(refused, model, small, edit):
    edit(plan=dict(version=1, sizes=[{"f": 48}], keep=[{"f": [1]}]))
    assert "made for 1 layers, the model has 2" in refused("verify", model, small)
    assert "jaxprune.json is for 1 layers, the model has 2" in refused("inspect", small)


def test_a_record_that_names_other_units(jaxprune, refused, model, small, edit):
    kept, *others = (layer["f"] for layer in edit.plan["keep"])
    swapped = sorted({*kept[1:], min(set(range(48)) - set(kept))})
    edit(plan=edit.plan | dict(keep=[edit.plan["keep"][0] | dict(f=swapped), edit.plan["keep"][1]]))
    done = jaxprune("verify", model, small, "--length", 16)
    assert done.status == 1 and "undeclared update: layers.0.gate" in done.err
    edit(plan=edit.plan | dict(keep=[edit.plan["keep"][0] | dict(f=kept[1:]), edit.plan["keep"][1]]))
    assert "layer 0 is (2, 2, 32), the plan asks for (2, 2, 31)" in refused("verify", model, small)


def test_a_chain_that_does_not_join(refused, model, small, edit, tmp_path):
    record = json.loads((small / "jaxprune.json").read_text())
    shorter = dict(version=1, sizes=[{"f": 40}] * 2, keep=[{"f": [0]}] * 2)
    edit(plan=shorter, before=record)
    assert "layer 0: axis f: 32 units are left, the plan that follows is for 40" in refused("verify", model, small)


def test_another_dense_model(refused, jaxprune, model, small, tmp_path):
    import jax

    from jaxprune.models import LayerDims, LlamaConfig, init, save

    cfg = LlamaConfig(vocab=300, d=32, head_dim=8, layers=(LayerDims(2, 2, 48),) * 2)
    shutil.copytree(model, tmp_path / "other")
    save(tmp_path / "other", init(jax.random.key(0), cfg), cfg)
    assert "vocab is 257, the plan asks for 300" in refused("verify", tmp_path / "other", small)
    assert "layer 0 has {'f': 48, 'k': 2} units in the plan" in refused("verify", small, small)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rank", 0), "rank: 0 given"),
        (("--alpha", 0), "alpha: 0 given"),
        (("--steps", 0), "steps: 0 given"),
        (("--batch-size", 0), "batch_size 0"),
        (("--length", 1), "length 1"),
        (("--learning-rate", 0), "learning_rate: 0.0 given"),
        (("--warmup", 9), "warmup: 9 given"),
        (("--accumulate", 3), "accumulate: 3 given; it must divide the 2 sequences"),
        (("--save-every", 0), "save_every: 0 given"),
        (("--data", "nowhere.json"), "nowhere.json: no such file"),
        (("--data", "unknown.json"), "record 1: no field 'instruction'; it has ['answer', 'question']"),
        (("--data", "unknown.jsonl"), "which field holds the text?"),
        (("--data", "unknown.jsonl:text"), "line 1: no field 'text'; it has ['answer', 'question']"),
    ],
)
def test_flags_of_recover(refused, model, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    unknown = dict(question="Why?", answer="So.")
    (tmp_path / "unknown.json").write_text(json.dumps([unknown]))
    (tmp_path / "unknown.jsonl").write_text(json.dumps(unknown))
    base = dict(zip(*[iter(("--data", "builtin", "--steps", 2, "--batch-size", 2, "--length", 16))] * 2, strict=True))
    words = [word for pair in (base | dict([flags])).items() for word in pair]
    assert message in refused("recover", model, "--out", tmp_path / "out", *words)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompt", ""), "prompt: it has no tokens"),
        (("--prompt", "\udcff"), "prompt: not UTF-8 at character 0"),
        (("--prompt", "A", "--max-new-tokens", 0), "max_new_tokens: 0 given"),
        (("--prompt", "A", "--temperature", -1), "temperature: -1.0 given"),
    ],
)
def test_flags_of_generate(refused, model, flags, message):
    assert message in refused("generate", model, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--samples", 0), "samples 0, length 64"),
        (("--length", 1), "samples 2, length 1"),
        (("--text", "nowhere.txt"), "nowhere.txt: no such file"),
    ],
)
def test_flags_of_verify(refused, model, small, flags, message):
    assert message in refused("verify", model, small, *flags)
