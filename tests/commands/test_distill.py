"""`jaxprune recover --distill`: what it records, how it resumes, and what it refuses."""

import json

import jax
import pytest
from safetensors.numpy import load_file

from jaxprune import data, folder, models, recovery

TRAINING = ("--data", "builtin", "--steps", 4, "--batch-size", 2, "--length", 16)


@pytest.fixture
def recover(jaxprune, small, tmp_path):
    """Runs `recover` on the pruned model with these flags; the result as `--json` has it."""

    def run(*flags, status=0):
        done = jaxprune("recover", small, "--out", tmp_path / "out", *TRAINING, *flags, "--json", tmp_path / "r.json")
        assert done.status == status, done.err
        return done.err if status else json.loads((tmp_path / "r.json").read_text())

    return run


@pytest.mark.parametrize(
    ("flags", "updated"),
    [
        (("--rank", 2, "--top-k", 9, "--temperature", 2, "--hidden-weight", 1, "--layer-map", "1:1"), "lora"),
        (("--train", "full", "--distill-loss", "blockwise"), "blocks"),
        (("--train", "full", "--distill-loss", "reverse", "--ce-weight", 0.5, "--save-every", 4), "everything"),
    ],
    ids=["lora", "blockwise", "full"],
)
def test_what_changed_is_recorded_and_verified(recover, jaxprune, model, small, tmp_path, flags, updated):
    losses = [row["loss"] for row in recover("--distill", model, *flags)["losses"]]
    update = json.loads((tmp_path / "out" / "jaxprune.json").read_text())["updates"][-1]
    assert update["by"] == "distillation" and update["losses"] == losses
    assert update["settings"]["distill"] == str(model) and ("top_k" in update["settings"]) == (updated == "lora")
    before, after = (load_file(f / "model.safetensors") for f in (small, tmp_path / "out"))
    changed = {name for name in before if (before[name] != after[name]).any()}
    matrices = {name for name in before if "layers" in name and "norm" not in name}
    expected = dict(lora=matrices, blocks={name for name in before if "layers" in name}, everything=set(before))
    assert changed == expected[updated]
    assert set(update["arrays"]) == set(
        models.axes.MATRICES if updated == "lora" else models.axes.ATTENTION | models.axes.MLP | models.axes.TOP
    )
    assert jaxprune("verify", model, tmp_path / "out", "--length", 16).status == 0


def test_all_weights_can_learn_from_text_alone(recover, jaxprune, model, tmp_path):
    recover("--train", "full")
    assert json.loads((tmp_path / "out" / "jaxprune.json").read_text())["updates"][-1]["by"] == "training"
    assert jaxprune("verify", model, tmp_path / "out", "--length", 16).status == 0


@pytest.mark.parametrize("train", ["full"])
def test_an_interrupted_run_goes_on_with_the_same_teacher_alone(recover, model, small, tmp_path, monkeypatch, train):
    flags = ("--distill", model, "--train", train, "--save-every", 1)
    whole = recover(*flags)["losses"]
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()

    save = recovery.train._checkpoints.save

    def stop(manager, step, *rest):
        save(manager, step, *rest)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recovery.train._checkpoints, "save", stop)
        assert "checkpoints are kept" in recover(*flags, "--overwrite", status=2)
    other = recover("--distill", small, *flags[2:], "--overwrite", "--resume", status=2)
    assert "written with other settings (distillation.teacher was" in other
    assert "distillation was" in recover(*flags[2:], "--overwrite", "--resume", status=2)
    assert recover(*flags, "--overwrite", "--resume")["losses"] == whole
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights


@pytest.fixture
def wider(model, tmp_path):
    """A model of another vocabulary and another width."""
    cfg = models.LlamaConfig(vocab=300, d=40, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 3)
    path = tmp_path / "wider"
    models.save(path, models.init(jax.random.key(1), cfg), cfg, folder.load(str(model)).tokenizer)
    return path


BLOCKWISE = ("--distill-loss", "blockwise")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--top-k", 5), "top_k: 5 given without --distill TEACHER"),
        (BLOCKWISE, "distill_loss: blockwise given without --distill TEACHER"),
        (("--distill", "nowhere/at/all"), "model nowhere/at/all: no such folder or file"),
        (("--distill", "wider"), "its vocabulary has 300 tokens, the student's 257"),
        (("--distill", "model", "--temperature", 0), "temperature: 0.0 given"),
        (("--distill", "model", "--top-k", 0), "top_k: 0 given"),
        (("--distill", "model", "--ce-weight", -1), "ce_weight: -1.0 given"),
        (("--distill", "model", "--hidden-weight", "nan"), "hidden_weight: nan given"),
        (("--distill", "model", "--layer-map", "0:0"), "layer_map: given without a hidden_weight"),
        (
            ("--distill", "model", "--hidden-weight", 1, "--layer-map", "0-0"),
            "layer_map: '0-0' given; give pairs STUDENT:TEACHER",
        ),
        (
            ("--distill", "model", "--hidden-weight", 1, "--layer-map", "0:2"),
            "layer_map: 0:2 given; the student has layers [0, 1]",
        ),
        (("--distill", "model", *BLOCKWISE, "--ce-weight", 1), "ce_weight: 1.0 given; blockwise distillation compares"),
        (("--distill", "wider", *BLOCKWISE), "its residual stream has 40 channels, the student's 32"),
        (("--train", "full", "--rank", 4), "rank: 4 given with --train full, which has no adapters"),
    ],
)
def test_flags_are_checked_before_any_weight_is_read(refused, model, small, wider, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(folder, "load", None)
    monkeypatch.setattr(data, "training_batches", None)
    places = dict(model=model, wider=wider)
    words = (places.get(word, word) for word in flags)
    assert message in refused("recover", small, "--out", tmp_path / "out", *TRAINING, *words)


def test_a_teacher_with_another_tokenizer_is_refused(refused, model, small, tmp_path):
    path = tmp_path / "other"
    models.save(path, *models.load(model), folder.load(str(model)).tokenizer)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refused("recover", small, "--out", tmp_path / "out", *TRAINING, "--distill", path)
    assert "has another tokenizer than" in message
