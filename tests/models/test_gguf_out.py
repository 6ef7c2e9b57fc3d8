"""GGUF files that we write: read back exactly, as large as predicted, or refused where llama.cpp would run another model."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxprune import models
from jaxprune.models import LayerDims, _gguf, _gguf_blocks, _gguf_tokenizer
from jaxprune.models.export import gguf
from jaxprune.models.export._gguf_tokenizer import vocabulary

FULL = LayerDims(2, 2, 64)
LAYERS = {
    "equal": (FULL,) * 3,
    "widths": (FULL, LayerDims(1, 3, 40), LayerDims(3, 1, 96)),
    "gone sublayers": (LayerDims(0, 0, 48), LayerDims(2, 2, 0), LayerDims(0, 0, 0), LayerDims(0, 0, 64), FULL),
    "a gone layer": (FULL, LayerDims(0, 0, 0), FULL),
}
ROPES = {
    "none": {},
    "linear": dict(factor=2.0),
    "yarn": dict(factor=4.0, original_max_position_embeddings=16),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    "longrope": dict(short_factor=(1.0, 1.5, 2.0, 2.5), long_factor=(1.0, 3.0, 5.0, 7.0), original_max_position_embeddings=16),
}


def config(layers=(FULL,) * 2, rope="none", **settings) -> models.LlamaConfig:
    scaling = tuple(sorted((ROPES[rope] | dict(rope_type=rope)).items())) if rope != "none" else ()
    return models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=layers, rope_scaling=scaling, **dict(eos_ids=(2,)) | settings)


def random(cfg):
    """Parameters of numpy, none of them zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), models.shapes(cfg))


def written(path, cfg, tokenizer=None, quantization="f32"):
    params = random(cfg)
    return params, gguf.write(path, params, cfg, tokenizer, quantization)


def metadata(path) -> dict:
    return _gguf.open_header(path).metadata


def data_bytes(path) -> int:
    import gguf as library

    return path.stat().st_size - library.GGUFReader(path).data_offset


def same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("biases", [(), ("q", "k", "v"), ("o", "down"), ("q", "k", "v", "o", "gate", "up", "down")], ids=str)
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_f32_comes_back_with_the_same_bits(tmp_path, layers, biases):
    cfg = config(layers, biases=biases, tie_embeddings=len(layers) == 3, rope_theta=5e5, norm_eps=1e-6, eos_ids=(1, 2))
    params, notes = written(tmp_path / "m.gguf", cfg)
    back, back_cfg = models.load(tmp_path / "m.gguf")
    assert (back_cfg, notes) == (cfg, [])
    same(back, params)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_settings_come_back(tmp_path, rope, family):
    biases = ("q", "k", "v") if family == "qwen2" else ()
    cfg = config(rope=rope, family=family, biases=biases, sliding_window=4096 if family == "mistral" else None)
    params, _ = written(tmp_path / "m.gguf", cfg)
    back, back_cfg = models.load(tmp_path / "m.gguf")
    assert back_cfg == cfg
    same(back, params)


@pytest.mark.parametrize(
    ("layers", "settings", "architecture"),
    [
        (LAYERS["equal"], {}, "llama"),
        (LAYERS["a gone layer"], {}, "llama"),
        (LAYERS["a gone layer"], dict(biases=("down",)), "deci"),
        (LAYERS["widths"], {}, "deci"),
        (LAYERS["equal"], dict(family="qwen2", biases=("q", "k", "v")), "qwen2"),
        (LAYERS["equal"], dict(family="qwen2", biases=("q", "k", "v"), rope="llama3"), "llama"),
        (LAYERS["widths"], dict(family="qwen2", biases=("q", "k", "v")), "deci"),
    ],
)
def test_architecture(tmp_path, layers, settings, architecture):
    written(tmp_path / "m.gguf", config(layers, **settings))
    assert metadata(tmp_path / "m.gguf")["general.architecture"] == architecture


def test_what_llama_cpp_reads_of_gone_sublayers(tmp_path):
    """No layer has an MLP of width 0, and the first one has a head."""
    written(tmp_path / "m.gguf", config(LAYERS["gone sublayers"]))
    found = metadata(tmp_path / "m.gguf")
    assert found["deci.block_count"] == 4
    assert found["deci.attention.head_count"] == [1, 4, 0, 4]
    assert found["deci.attention.head_count_kv"] == [1, 2, 0, 2]
    assert found["deci.feed_forward_length"] == [48, 32, 64, 64]


@pytest.mark.parametrize("rope", ["none", "linear", "yarn"])
def test_a_deci_file_of_others_is_read_as_it_stands(tmp_path, rope):
    layers = (FULL, LayerDims(0, 0, 64), LayerDims(1, 3, 40), LayerDims(1, 2, 0))
    cfg = config(layers, rope)
    params, _ = written(tmp_path / "m.gguf", cfg)
    data = (tmp_path / "m.gguf").read_bytes()
    key = _gguf_blocks.CONFIG_KEY.encode()
    assert data.count(key) == 1
    (tmp_path / "m.gguf").write_bytes(data.replace(key, b"somebody.config"))
    back, back_cfg = models.load(tmp_path / "m.gguf")
    assert back_cfg == dataclasses.replace(cfg, layers=(*layers[:3], LayerDims(1, 2, 32)), eos_ids=())
    same(back["run_2"], params["run_2"])
    tokens = jax.numpy.arange(12)[None]
    np.testing.assert_allclose(
        models.apply(back, tokens, back_cfg), models.apply(jax.device_put(params), tokens, cfg), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("quantization", gguf.TYPES)
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_sizes_are_as_predicted_and_rounding_is_that_of_the_library(tmp_path, layers, quantization):
    import gguf as library

    cfg = config(layers, "llama3", biases=("o",), tie_embeddings=True)
    params, notes = written(tmp_path / "m.gguf", cfg, quantization=quantization)
    assert data_bytes(tmp_path / "m.gguf") == gguf.predicted_bytes(cfg, quantization)
    back, _ = models.load(tmp_path / "m.gguf")
    kind = library.GGMLQuantizationType[quantization.upper()]
    rounded = library.quants.dequantize(library.quants.quantize(params["embed"], kind), kind)
    np.testing.assert_array_equal(back["embed"], rounded)
    np.testing.assert_array_equal(back["norm"], params["norm"])
    narrow = quantization.startswith("q") and layers != LAYERS["equal"]  # one head of 8 stands in for the bias of a gone one
    assert len(notes) == narrow


def test_a_matrix_with_other_rows_is_reported_and_f16(tmp_path):
    params, notes = written(tmp_path / "m.gguf", config((LayerDims(2, 2, 40),)), quantization="q8_0")
    assert notes == [
        "1 of 9 matrices are stored as f16 instead of q8_0, e.g. blk.0.ffn_down.weight with rows of 40 numbers: q8_0 needs "
        "multiples of 32 (prune with --multiple-of 32)"
    ]
    back, _ = models.load(tmp_path / "m.gguf")
    np.testing.assert_array_equal(back["run_0"]["down"], params["run_0"]["down"].astype(np.float16))


def test_matrices_are_quantised_in_parts(tmp_path, monkeypatch):
    cfg = config(LAYERS["widths"])
    written(tmp_path / "a.gguf", cfg, quantization="q8_0")
    monkeypatch.setattr(gguf, "PART", 100)
    written(tmp_path / "b.gguf", cfg, quantization="q8_0")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (dict(shortcuts=True), "residual stream was rotated .* --units kv,mlp"),
        (dict(norm_width=48), "residual stream was rotated"),
        (dict(sliding_window=16), "sliding_window 16 is less than max_positions 2048"),
        (dict(rope_scaling=(("factor", 2.0), ("rope_type", "dynamic"))), "rope scaling 'dynamic'"),
        (dict(rope_scaling=(("columns", 4), ("first", 1), ("rope_type", "grid"))), "rope scaling 'grid'"),
        (dict(rope_scaling=(("attention_factor", 2.0), ("factor", 2.0), ("rope_type", "yarn"))), "leave beta_fast"),
        (dict(layers=(LayerDims(0, 0, 0),) * 2), "nothing is left of its 2 layers"),
    ],
)
def test_problems(tmp_path, settings, match):
    cfg = dataclasses.replace(config(), **settings)
    assert len(gguf.problems(cfg)) == 1
    with pytest.raises(ValueError, match=match):
        gguf.write(tmp_path / "m.gguf", random(cfg), cfg, None)
    assert not list(tmp_path.iterdir())


def test_bad_input(tmp_path):
    cfg, path = config(), tmp_path / "m.gguf"
    params = random(cfg)
    with pytest.raises(ValueError, match="quantization 'q4_k' given; allowed are f16, f32"):
        gguf.write(path, params, cfg, None, "q4_k")
    with pytest.raises(ValueError, match="q4_k"):
        gguf.predicted_bytes(cfg, "q4_k")
    with pytest.raises(ValueError, match="params.*shape"):
        gguf.write(path, params, config((FULL,)), None)
    with pytest.raises(ValueError, match="tokenizer str given"):
        gguf.write(path, params, cfg, "gpt2")
    assert not path.exists()
    params["run_0"]["up"][1, 2, 3] = 1e5
    with pytest.raises(ValueError, match="blk.1.ffn_up.weight has values that overflow f16; write bf16 or f32"):
        gguf.write(path, params, cfg, None, "f16")
    params["run_0"]["up"][1, 2, 3] = np.nan
    with pytest.raises(ValueError, match="blk.1.ffn_up.weight holds NaN"):
        gguf.write(path, params, cfg, None, "q8_0")


def changed(path, old: bytes, new: bytes):
    data = path.read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    path.write_bytes(data.replace(old, new))
    with pytest.raises(ValueError) as e:
        models.load(path)
    return str(e.value)


def test_our_key_must_agree_with_the_file(tmp_path):
    path = tmp_path / "m.gguf"
    written(path, config(LAYERS["widths"]))
    assert "says d 64, and the keys of GGUF 32" in changed(path, b'"hidden_size": 32', b'"hidden_size": 64')
    written(path, config(LAYERS["widths"]))
    assert "says layers" in changed(path, b'"intermediate_size": 40', b'"intermediate_size": 48')
    written(path, config(LAYERS["widths"]))
    assert "cannot be read" in changed(path, b'{"architectures"', b'["architectures"')


def test_what_stands_in_for_a_gone_sublayer_must_be_zero(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    monkeypatch.setattr(gguf.np, "broadcast_to", lambda x, shape: np.ones(shape, np.float32))
    written(path, config(LAYERS["gone sublayers"]))
    with pytest.raises(ValueError, match="blk.0.attn_output.weight is not zero, but jaxprune.config says"):
        models.load(path)


VOCABULARY = _gguf_tokenizer.Vocabulary(
    kind="gpt2",
    pre="smollm",
    tokens=["<unk>", "<s>", "</s>", "a", "b", "Ġ", "ab", "Ġab", "<tool>"],
    types=[3, 3, 3, 1, 1, 1, 1, 1, 4],
    scores=[],
    merges=["a b", "Ġ ab"],
    special=dict(bos=1, eos=2, unk=0, pad=2),
    add_bos=True,
    add_eos=False,
    space_prefix=False,
    chat_template="{{ messages }}",
)
SENTENCEPIECE = VOCABULARY._replace(
    kind="llama",
    pre="default",
    tokens=["<unk>", "<s>", "</s>", "<0x41>", "ab", "▁ab", "a", "b", "▁"],
    types=[2, 3, 3, 6, 1, 1, 1, 1, 1],
    scores=[-2.0, -2.0, -2.0, -2.0, 0.0, -1.0, -2.0, -2.0, -2.0],
    merges=[],
    special=dict(bos=1, eos=2, unk=0),
    add_eos=True,
    space_prefix=True,
    chat_template=None,
)


@pytest.mark.parametrize(
    "words",
    [
        VOCABULARY,
        VOCABULARY._replace(add_bos=False, add_eos=True, chat_template=None),
        SENTENCEPIECE,
        SENTENCEPIECE._replace(space_prefix=False),
        *(VOCABULARY._replace(pre=pre) for pre in ("default", "gpt-2", "llama-bpe", "dbrx", "qwen2", "tekken")),
    ],
    ids=lambda v: f"{v.kind} {v.pre}",
)
def test_a_tokenizer_comes_back(tmp_path, words):
    """Through the tokenizer of transformers and through the file; rows of the embedding without a token are unused."""
    path = tmp_path / "m.gguf"
    written(path, config(), _gguf_tokenizer.assemble(words))
    back = _gguf_tokenizer.from_gguf(path, metadata(path))
    n = len(words.tokens)
    assert back.tokens[n:] == [f"[PAD{i}]" for i in range(n, 64)] and set(back.types[n:]) == {_gguf_tokenizer.UNUSED}
    scores = back.scores[:n]
    assert back._replace(tokens=back.tokens[:n], types=back.types[:n], scores=scores) == words
    assert models.load_tokenizer(path)("ab ab").input_ids == _gguf_tokenizer.assemble(words)("ab ab").input_ids


def fast(pre_tokenizer, **settings):
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate("abc")}, [], **settings))
    tokenizer.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="c")


def test_pre_tokenizers_in_the_forms_of_tokenizer_json():
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    split = pre_tokenizers.Split(Regex(_gguf_tokenizer.LLAMA3), "isolated")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cfg = config()
    assert vocabulary(fast(byte_level), cfg).pre == "gpt-2"
    assert vocabulary(fast(pre_tokenizers.Sequence([digits, byte_level])), cfg).pre == "smollm"
    assert vocabulary(fast(pre_tokenizers.Sequence([split, last]), ignore_merges=True), cfg).pre == "llama-bpe"
    with pytest.raises(ValueError, match="none of the pre-tokenizers of llama.cpp"):
        vocabulary(fast(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("x+"), "isolated"), last])), cfg)
    with pytest.raises(ValueError, match="llama.cpp has no such step"):
        vocabulary(fast(pre_tokenizers.Whitespace()), cfg)


def test_tokenizers_that_cannot_be_said():
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    nameless = fast(byte_level)
    nameless.eos_token = None
    assert vocabulary(nameless, config()).special["eos"] == 2
    with pytest.raises(ValueError, match="set tokenizer.eos_token"):
        vocabulary(nameless, config(eos_ids=()))
    with pytest.raises(ValueError, match="ids up to 2, the model 2 rows"):
        vocabulary(fast(byte_level), dataclasses.replace(config(), vocab=2))
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a")))
    with pytest.raises(ValueError, match="tokenizer model 'WordLevel' given"):
        vocabulary(words, config())


@pytest.mark.real
def test_the_tokenizer_of_smollm2_is_written_as_it_was_read(tmp_path, smollm2):
    cfg = dataclasses.replace(models.checkpoint.read_config(smollm2), layers=(FULL,), d=32, head_dim=8)
    gguf.write(tmp_path / "m.gguf", random(cfg), cfg, models.load_tokenizer(smollm2), "q8_0")
    before, after = metadata(smollm2), metadata(tmp_path / "m.gguf")
    keys = [key for key in before if key.startswith("tokenizer.")]
    assert len(keys) > 10
    assert {key: after[key] for key in keys} == {key: before[key] for key in keys}
    assert json.loads(after[_gguf_blocks.CONFIG_KEY])["hidden_size"] == 32
