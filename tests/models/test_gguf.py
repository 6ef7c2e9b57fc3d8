"""GGUF files: written with the package `gguf` from models of transformers, and the real one."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import models
from jaxprune.models import checkpoint

QUANTISED = ("Q8_0", "Q4_0", "Q5_1", "BF16")
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{LAYER[rest]}.{kind}"


def write(path: Path, model, dtype="F32", architecture="llama", metadata=(), tensors=(), change=None) -> Path:
    """Writes a torch model as llama.cpp's converter does: q and k rows interleaved for `llama`."""
    import gguf

    cfg = model.config
    out = gguf.GGUFWriter(path, architecture)
    out.add_context_length(cfg.max_position_embeddings)
    out.add_embedding_length(cfg.hidden_size)
    out.add_block_count(cfg.num_hidden_layers)
    out.add_feed_forward_length(cfg.intermediate_size)
    out.add_head_count(cfg.num_attention_heads)
    out.add_head_count_kv(cfg.num_key_value_heads)
    out.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    out.add_rope_freq_base(cfg.rope_parameters["rope_theta"])
    head_dim = getattr(cfg, "head_dim", None) or cfg.hidden_size // cfg.num_attention_heads
    if head_dim * cfg.num_attention_heads != cfg.hidden_size:
        out.add_key_length(head_dim)
        out.add_value_length(head_dim)
        out.add_rope_dimension_count(head_dim)
    for key, value in metadata:
        add = out.add_string if isinstance(value, str) else out.add_uint32 if isinstance(value, int) else out.add_float32
        add(key, value)
    for name, x in model.state_dict().items():
        if name == "lm_head.weight" and cfg.tie_word_embeddings:
            continue
        x = x.numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            x = x.reshape(-1, 2, head_dim // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        kind = gguf.GGMLQuantizationType[dtype if x.ndim > 1 else "F32"]
        x = gguf.quants.quantize(np.ascontiguousarray(x), kind)
        out.add_tensor(gguf_name(name), x, raw_dtype=kind)
    for name, x in tensors:
        out.add_tensor(name, x)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def compare(path, model, tokens, logits_of, **tolerance):
    params, cfg = models.load(path)
    ours = models.apply(params, jnp.asarray(tokens), cfg)
    np.testing.assert_allclose(ours, logits_of(model, tokens), **(dict(atol=1e-4, rtol=1e-4) | tolerance))
    return params, cfg


@pytest.mark.parametrize(
    ("kv_heads", "settings"),
    [(4, dict()), (2, dict(tie_word_embeddings=True)), (1, dict(head_dim=16)), (2, dict(attention_bias=True))],
)
def test_llama(oracle, tmp_path, tokens, logits_of, kv_heads, settings):
    model = oracle("llama", num_key_value_heads=kv_heads, **settings)
    params, cfg = compare(write(tmp_path / "m.gguf", model), model, tokens, logits_of)
    assert cfg.norm_eps == model.config.rms_norm_eps
    assert ("head" in params) == (not cfg.tie_embeddings)


def test_qwen2(oracle, tmp_path, tokens, logits_of):
    model = oracle("qwen2")
    _, cfg = compare(write(tmp_path / "m.gguf", model, architecture="qwen2"), model, tokens, logits_of)
    assert (cfg.family, cfg.biases) == ("qwen2", ("q", "k", "v"))


def test_qwen3(oracle, tmp_path, tokens, logits_of):
    model = oracle("qwen3", head_dim=16)
    _, cfg = compare(write(tmp_path / "m.gguf", model, architecture="qwen3"), model, tokens, logits_of)
    assert (cfg.family, cfg.qk_norm, cfg.head_dim) == ("qwen3", True, 16)


@pytest.mark.parametrize("dtype", ["F16", *QUANTISED])
def test_quantised(oracle, tmp_path, tokens, logits_of, dtype):
    """Equal to the torch model whose weights went through the same rounding."""
    import gguf
    import torch

    model = oracle("llama", hidden_size=64, intermediate_size=96)
    path = write(tmp_path / "m.gguf", model, dtype)
    kind = gguf.GGMLQuantizationType[dtype]
    with torch.no_grad():
        for x in model.parameters():
            if x.ndim > 1:
                x.copy_(torch.tensor(gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind)))
    params, _ = compare(path, model, tokens, logits_of)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
    half, _ = models.load(path, dtype="bfloat16")
    np.testing.assert_array_equal(half["embed"], params["embed"].astype("bfloat16"))


def test_heads_that_are_read_in_parts(oracle, tmp_path, tokens, logits_of, monkeypatch):
    from jaxprune.models import _gguf

    monkeypatch.setattr(_gguf, "PART", 100)  # 3 rows of 32
    model = oracle("llama", attention_bias=True)
    compare(write(tmp_path / "m.gguf", model), model, tokens, logits_of)


@pytest.mark.parametrize(
    ("rope", "metadata"),
    [
        (dict(rope_type="default"), []),
        (dict(rope_type="linear", factor=2.0), [("llama.rope.scaling.type", "linear"), ("llama.rope.scaling.factor", 2.0)]),
        (dict(rope_type="linear", factor=4.0), [("llama.rope.scale_linear", 4.0)]),
        (
            dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
            [
                ("llama.rope.scaling.type", "yarn"),
                ("llama.rope.scaling.factor", 4.0),
                ("llama.rope.scaling.original_context_length", 16),
            ],
        ),
    ],
)
def test_rope(oracle, tmp_path, tokens, logits_of, rope, metadata):
    model = oracle("llama", rope_parameters=dict(rope_theta=500.0) | rope)
    compare(write(tmp_path / "m.gguf", model, metadata=metadata), model, tokens, logits_of)


@pytest.mark.parametrize("original", [8192, 32])
def test_llama3_rope_is_stored_as_divisors(oracle, tmp_path, tokens, logits_of, original):
    rope = dict(rope_type="llama3", rope_theta=1e6, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    model = oracle("llama", head_dim=16, rope_parameters=rope | dict(original_max_position_embeddings=original))
    plain = 1e6 ** -(np.arange(0, 16, 2) / 16)
    divisors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    path = write(tmp_path / "m.gguf", model, tensors=[("rope_freqs.weight", divisors)])
    _, cfg = compare(path, model, tokens, logits_of)
    assert dict(cfg.rope_scaling)["rope_type"] == ("llama3" if original == 8192 else "longrope")


def test_longrope_factors(oracle, tmp_path, tokens, logits_of):
    short, long = [1.0, 1.5, 2.0, 2.5], [1.0, 3.0, 5.0, 7.0]
    rope = dict(rope_type="longrope", short_factor=short, long_factor=long, attention_factor=1.25)
    model = oracle("llama", rope_parameters=rope | dict(rope_theta=1e4, original_max_position_embeddings=16))
    metadata = [("llama.rope.scaling.attn_factor", 1.25), ("llama.rope.scaling.original_context_length", 16)]
    factors = [("rope_factors_short.weight", np.float32(short)), ("rope_factors_long.weight", np.float32(long))]
    path = write(tmp_path / "m.gguf", model, metadata=metadata, tensors=factors)
    compare(path, model, tokens[:, :12], logits_of)
    compare(path, model, tokens, logits_of)


def refused(path, match):
    with pytest.raises(ValueError, match=match) as e:
        models.load(path)
    assert "\n" not in str(e.value)


def test_refusals(oracle, tmp_path):
    model = oracle("llama")
    refused(
        write(tmp_path / "a.gguf", model, architecture="gemma"), "architecture 'gemma' is not supported; supported are llama"
    )
    refused(write(tmp_path / "b.gguf", model, metadata=[("llama.expert_count", 8)]), "mixture of 8 experts")
    refused(write(tmp_path / "c.gguf", model, metadata=[("llama.rope.dimension_count", 4)]), "4 .rotated.")
    scaling = [("llama.rope.scaling.type", "magic"), ("llama.rope.scaling.factor", 2.0)]
    refused(write(tmp_path / "d.gguf", model, metadata=scaling), "rope scaling 'magic'")
    extra = [("blk.0.attn_q_norm.weight", np.ones(8, np.float32))]
    refused(write(tmp_path / "e.gguf", model, tensors=extra), "tensor blk.0.attn_q_norm.weight has no place")
    extra = [("rope_freqs.weight", np.ones(3, np.float32))]
    refused(write(tmp_path / "f.gguf", model, tensors=extra), "rope_freqs.weight has 3 numbers; it needs 4")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    refused(write(tmp_path / "g.gguf", model), "tensor blk.1.ffn_up.weight holds NaN")


@pytest.mark.parametrize("keep", [0, 10, 200, 0.5, 0.98])
def test_truncated(oracle, tmp_path, keep):
    path = write(tmp_path / "m.gguf", oracle("llama"))
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
    refused(path, "not a complete GGUF file")


def test_the_header_is_read_once_until_the_file_changes(oracle, tmp_path, monkeypatch):
    import gguf

    opened = []
    reader = gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: opened.append(path) or reader(path))
    path = write(tmp_path / "m.gguf", oracle("llama"))
    params, cfg = models.load(path)
    assert checkpoint.read_config(path) == cfg
    assert opened == [path]
    write(path, oracle("llama", num_hidden_layers=1))
    assert len(checkpoint.read_config(path).layers) == 1 < len(cfg.layers)
    assert opened == [path, path]


def test_not_gguf(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK" * 100)
    refused(tmp_path / "m.gguf", "not a complete GGUF file")


@pytest.mark.real
def test_smollm2_equals_transformers(smollm2, monkeypatch):
    import torch
    import transformers.modeling_utils

    if importlib.util.find_spec("accelerate") is None:  # asked for, but not used on the CPU
        monkeypatch.setattr(transformers.modeling_utils, "is_accelerate_available", lambda *_: True)
    tokens = np.asarray(
        models.load_tokenizer("smollm2")("The quick brown fox jumps over the lazy dog. In 1984, " * 8).input_ids
    )[None]
    oracle = transformers.AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)
    with torch.no_grad():
        wanted = oracle(torch.tensor(tokens)).logits.numpy()
    params, cfg = models.load("smollm2")
    assert np.abs(np.asarray(models.apply(params, jnp.asarray(tokens), cfg)) - wanted).max() < 1e-3


@pytest.mark.real
def test_loading_holds_the_model_once(smollm2, tmp_path):
    """Peak memory above the imports' stays near the size of the parameters, for GGUF and for safetensors."""
    import subprocess
    import sys

    script = """
import sys, jax
from jaxprune import models
from jaxprune.commands._common import peak_memory as peak
from jaxprune.models import checkpoint
import gguf, ml_dtypes, safetensors
jax.block_until_ready(jax.numpy.zeros(1))
start = peak()
params, cfg = models.load(sys.argv[1])
print((peak() - start) / sum(x.nbytes for x in jax.tree.leaves(params)))
if len(sys.argv) > 2: models.save(sys.argv[2], params, cfg)
"""
    for arguments in (["smollm2", str(tmp_path)], [str(tmp_path)]):
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
        assert float(done.stdout) < 1.35
