"""Models that cannot be read: every command names what is wrong with them and leaves no file behind."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

WEIGHTS = "model.layers.1.mlp.up_proj.weight"


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    tensors[WEIGHTS] = change(tensors[WEIGHTS].copy())
    save_file(tensors, folder / "model.safetensors")


def commands(folder, tmp_path):
    """Every command that reads a model."""
    out = ("--out", tmp_path / "out")
    return [
        ("run", folder, *out),
        ("prune", folder, *out, "--method", "random"),
        ("recover", folder, *out, "--data", "builtin"),
        ("evaluate", folder),
        ("generate", folder, "--prompt", "A"),
        ("verify", folder, folder),
    ]


@pytest.mark.parametrize("n", range(6))
def test_models_that_cannot_be_read(refused, dense, model, tmp_path, n):
    command = commands(model, tmp_path)[n]
    if command[0] == "run":  # which prunes with gradients: only loading is of interest here
        command = (*command, "--method", "random")
    edit_weights(model, lambda x: np.where(x == x.max(), np.nan, x))
    assert f"tensor {WEIGHTS} holds NaN or infinite values" in refused(*command)
    edit_weights(model, lambda x: np.where(np.isnan(x), np.inf, x))
    assert f"tensor {WEIGHTS} holds NaN or infinite values" in refused(*command)
    edit_weights(model, lambda x: x[1:].copy())
    assert f"tensor {WEIGHTS} has shape (47, 32)" in refused(*command)
    (model / "model.safetensors").write_bytes((dense / "model.safetensors").read_bytes()[:-9])
    assert "not a complete safetensors file" in refused(*command)
    edit_json(model / "config.json", architectures=["GPT2LMHeadModel"])
    assert "'GPT2LMHeadModel' is not supported; supported are LlamaForCausalLM, " in refused(*command)
    shutil.rmtree(model)
    assert f"model {model}: no such folder or file" in refused(*command)


def test_a_tokenizer_that_is_missing_or_damaged(refused, model):
    command = ("generate", model, "--prompt", "A")
    (model / "tokenizer.json").write_text("{}")
    assert "not a tokenizer" in refused(*command)
    (model / "tokenizer.json").unlink()
    assert "no tokenizer.json" in refused(*command)


def test_a_tokenizer_of_another_model(refused, model, tmp_path):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    swapped = {word: {**vocab, "e": 999}[word] for word in vocab}
    edit_json(model / "tokenizer.json", model=tokenizer["model"] | dict(vocab=swapped))
    wrong = "the tokenizer makes token 999, the model has 0 to 256"
    assert wrong in refused("prune", model, "--out", tmp_path / "out")
    data = ("--data", "builtin", "--batch-size", 2, "--length", 32, "--steps", 2)
    assert wrong in refused("recover", model, "--out", tmp_path / "out", *data)
