"""Folders of the profiles hf, hf-padded and hf-custom, and of Mamba, in transformers: 5 here, 4 in `make test-transformers-4`.

They are written by another process, which always has the version that the library itself needs.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
WRITER = Path(__file__).parent / "write_folders.py"
PROFILES = dict(hf=16, hf_padded=8, hf_custom=13, states=2)  # how many folders of each
TOLERANCE = dict(float32=1e-5, bfloat16=5e-2)  # of the largest logit


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("written") / "folders"
    env = os.environ | dict(PYTHONPATH=str(ROOT), JAX_DISABLE_MOST_OPTIMIZATIONS="1", XLA_FLAGS="")
    done = subprocess.run([sys.executable, str(WRITER), str(out)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def ours(written) -> dict[str, np.ndarray]:
    return dict(np.load(written / "ours.npz"))


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
    """transformers copies the code of folders to where it can import it."""
    import transformers.dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", [*sys.path])
        yield


def load(folder: Path, **options):
    import transformers

    kind = transformers.AutoModelForCausalLM
    options = dict(dtype="auto", trust_remote_code=folder.parent.name == "hf_custom") | options
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def logits(model, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.float().numpy()


def greedy(model, prompt: np.ndarray, n: int, **options) -> np.ndarray:
    import torch

    mask = torch.tensor(np.cumsum(prompt != 2, 1) > 0).long()  # 2 pads on the left
    model.generation_config.eos_token_id = None
    out = model.generate(
        torch.tensor(prompt).long(), attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=2, **options
    )
    return out[:, prompt.shape[1] :].numpy()


@pytest.mark.parametrize("profile", PROFILES)
def test_logits_and_greedy_tokens_are_ours(written, ours, profile):
    folders = sorted((written / profile).iterdir())
    assert len(folders) == PROFILES[profile]
    for folder in folders:
        # transformers 4 caps attention scores in this implementation alone
        options = dict(attn_implementation="eager") if folder.name == "gemma2" else {}
        model, name = load(folder, **options), f"{profile}/{folder.name}"
        wanted = ours[f"{name}/logits"]
        tolerance = TOLERANCE[str(model.dtype).removeprefix("torch.")] * np.abs(wanted).max()
        np.testing.assert_allclose(logits(model, ours["tokens"]), wanted, atol=tolerance, rtol=0, err_msg=name)
        if (tokens := ours.get(f"{name}/greedy")) is not None:
            np.testing.assert_array_equal(greedy(model, ours["prompt"], tokens.shape[1]), tokens, err_msg=name)


@pytest.mark.parametrize("case", ["headless", "window"])
def test_caches_and_attention_of_our_code(written, ours, case):
    """No cache, a cache of fixed size and plain matrix products give the same tokens."""
    model = load(written / "hf_custom" / case)
    tokens = ours[f"hf_custom/{case}/greedy"]
    for options in (dict(use_cache=False), dict(cache_implementation="static")):
        np.testing.assert_array_equal(greedy(model, ours["prompt"], tokens.shape[1], **options), tokens)
    model.set_attn_implementation("eager")
    np.testing.assert_array_equal(greedy(model, ours["prompt"], tokens.shape[1]), tokens)


def test_our_code_trains(written, ours):
    """Every parameter gets a gradient, and checkpoints of activations do not change it."""
    import torch.utils.checkpoint

    model = load(written / "hf_custom" / "biases").train()
    tokens = torch.tensor(ours["tokens"]).long()

    def gradients():
        model.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    once = gradients()
    assert all(g.abs().max() > 0 for name, g in once.items() if not name.endswith("k_proj.bias"))  # softmax ignores these
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    again = gradients()
    assert all(torch.allclose(once[name], again[name]) for name in once)


def test_our_code_saves_what_it_loaded(written, ours, tmp_path):
    model = load(written / "hf_custom" / "rotated")
    model.save_pretrained(tmp_path)
    first, second = (json.loads((f / "config.json").read_text()) for f in (written / "hf_custom" / "rotated", tmp_path))
    assert {key: second.get(key) for key in first if key.startswith(("jaxprune", "per_layer", "num_"))} == {
        key: value for key, value in first.items() if key.startswith(("jaxprune", "per_layer", "num_"))
    }
    np.testing.assert_array_equal(logits(load(tmp_path, trust_remote_code=True), ours["tokens"]), logits(model, ours["tokens"]))


@pytest.mark.parametrize("case", ["mixed", "window_biases", "rotated"])
@pytest.mark.parametrize("kind", ["AutoModelForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"])
def test_no_other_model_is_built_without_permission(written, case, kind):
    import transformers

    options = dict(trust_remote_code=False) if kind.startswith("Auto") else {}
    with pytest.raises((ValueError, RuntimeError, ZeroDivisionError), match="trust_remote_code|per-layer|division"):
        getattr(transformers, kind).from_pretrained(written / "hf_custom" / case, **options)


@pytest.mark.parametrize("folder", ["hf/llama", "hf_custom/mixed"])
def test_special_tokens_of_the_model_reach_generation(written, folder):
    settings = load(written / folder).generation_config
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (0, 1, 2)


@pytest.mark.parametrize("folder", ["hf/llama", "hf_custom/mixed"])
def test_tokenizer_encodes_as_the_one_that_was_saved(written, folder):
    import transformers

    known = json.loads((written / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(written / folder)
    encoded = tokenizer(known["texts"], padding=True)
    assert encoded.input_ids == known["input_ids"]
    assert encoded.attention_mask == known["attention_mask"]
    assert tokenizer.batch_decode(encoded.input_ids) == known["decoded"]
    assert tokenizer.chat_template == "{{ messages }}"
