"""Folders that we write: the same bits come back, and transformers computes what we compute, or refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import models
from jaxprune.models import LayerDims, LlamaConfig, _safetensors, _stored

ALL = ("q", "k", "v", "o", "gate", "up", "down")
A, B, GONE = LayerDims(2, 2, 48), LayerDims(1, 3, 40), LayerDims(0, 0, 0)


def config(layers=(A, A, A), **settings) -> LlamaConfig:
    return LlamaConfig(vocab=64, d=32, head_dim=8, layers=tuple(layers), **settings)


UNIFORM = dict(
    plain=config(),
    tied=config(tie_embeddings=True, bos_id=1, eos_ids=(2, 3), pad_id=0),
    mistral=config(family="mistral", sliding_window=8),
    qwen2=config(family="qwen2", biases=("q", "k", "v")),
    llama_biases=config(biases=ALL),
    flap=config(biases=("o", "down")),
    flap_on_qwen2=config(family="qwen2", biases=("q", "k", "v", "o", "down")),
    flap_on_mistral=config(family="mistral", biases=("o",)),
    odd_heads=config([LayerDims(3, 1, 40)] * 2),
    odd_heads_qwen2=config([LayerDims(3, 1, 40)] * 2, biases=("q", "k", "v")),
    grouped=config([LayerDims(1, 2, 24)] * 2),
    layers_gone=config([A, GONE, A, A, GONE]),
    rope=config(rope_theta=500.0, rope_scaling=(("factor", 2.0), ("rope_type", "linear"))),
)
OTHERS = dict(
    widths=config([A, A, B]),
    attention_gone=config([A, LayerDims(0, 0, 48), A]),
    mlp_gone=config([A, LayerDims(2, 2, 0), A]),
    pairs=config([A, A._replace(pairs=(1, 3)), LayerDims(0, 0, 48), B._replace(pairs=(0,))], biases=("q", "v")),
    equal_pairs=config([A._replace(pairs=(1, 3))] * 2),
    much_gone=config([A, B, GONE, LayerDims(0, 0, 40), LayerDims(1, 1, 0)]),
    all_gone=config([GONE, GONE]),
    flap=config([A, B, LayerDims(0, 0, 48)], biases=("down",)),
    bias_left_behind=config([A, LayerDims(0, 0, 48), A], biases=("o", "down")),
    qwen2=config([A, B], family="qwen2", biases=("q", "k", "v"), tie_embeddings=True),
    mistral=config([A, B], family="mistral", sliding_window=8),
    window_and_biases=config(family="mistral", sliding_window=8, biases=("o",)),
)


def random(cfg: LlamaConfig, dtype="float32"):
    """Parameters without a zero, so that nothing is equal by chance."""
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda x: jnp.asarray(draw(0, 0.3, x.shape), dtype), models.shapes(cfg))


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("cfg", [*UNIFORM.values(), *OTHERS.values()], ids=[*UNIFORM, *(f"differ_{n}" for n in OTHERS)])
def test_the_same_bits_come_back(tmp_path, cfg):
    params = random(cfg, "bfloat16" if cfg.biases else "float32")
    models.save(tmp_path, params, cfg)
    again, read = models.load(tmp_path)
    assert_same_bits(params, again)
    assert dataclasses.replace(read, family=cfg.family) == cfg
    assert read.family == cfg.family or cfg in UNIFORM.values()
    models.save(tmp_path / "second", again, read)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@pytest.mark.parametrize("name", UNIFORM)
def test_transformers_loads_equal_layers(tmp_path, tokens, logits_of, name):
    import transformers

    cfg = UNIFORM[name]
    params = random(cfg)
    models.save(tmp_path, params, cfg)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours = models.apply(params, jnp.asarray(tokens), cfg)
    np.testing.assert_allclose(logits_of(model, tokens), ours, atol=1e-4, rtol=1e-4)
    assert model.config.eos_token_id in (list(cfg.eos_ids), *cfg.eos_ids, None)


@pytest.mark.parametrize("name", OTHERS)
def test_transformers_refuses_layers_that_differ_without_their_code(tmp_path, name):
    import transformers

    models.save(tmp_path, random(OTHERS[name]), OTHERS[name])
    assert (tmp_path / "modeling_jaxprune.py").is_file()
    for kind in ("AutoModelForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"):
        with pytest.raises((ValueError, RuntimeError, ZeroDivisionError), match="code|per-layer|zero"):
            getattr(transformers, kind).from_pretrained(tmp_path)


def test_plain_models_and_those_that_transformers_cannot_run_come_without_code(tmp_path):
    grid = config([A, B], rope_scaling=(("columns", 4), ("first", 1), ("rope_type", "grid")))
    for i, cfg in enumerate((UNIFORM["plain"], grid)):
        models.save(tmp_path / str(i), random(cfg), cfg)
        assert not (tmp_path / str(i) / "modeling_jaxprune.py").exists()
        assert "auto_map" not in models.to_hf_config(cfg)


def test_transformers_saves_and_we_load_again(tmp_path):
    import transformers

    cfg = UNIFORM["flap"]
    models.save(tmp_path / "a", random(cfg), cfg)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    params, read = models.load(tmp_path / "b")
    assert read.biases == cfg.biases
    assert_same_bits(params, random(cfg))


def test_rope_is_written_for_transformers_4_and_5():
    cfg = UNIFORM["rope"]
    written = models.to_hf_config(cfg)
    assert (written["rope_theta"], written["rope_scaling"]) == (500.0, dict(factor=2.0, rope_type="linear"))
    assert written["rope_parameters"] == dict(rope_theta=500.0, factor=2.0, rope_type="linear")
    for spelling in (("rope_parameters",), ("rope_theta", "rope_scaling")):
        assert models.from_hf_config({k: v for k, v in written.items() if k not in spelling}) == cfg


def test_shards_come_back(tmp_path):
    cfg = OTHERS["much_gone"]
    params = random(cfg)
    written = models.to_hf_config(cfg)
    (tmp_path / "config.json").write_text(json.dumps(written))
    tensors = _stored.tensors(params, cfg, written)
    _safetensors.write(tmp_path, tensors, _safetensors.tensor_names(written), together=False, shard=10_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert max(f.stat().st_size for f in tmp_path.glob("*.safetensors")) < 20_000
    assert_same_bits(models.load(tmp_path)[0], params)


def test_safetensors_reads_what_we_write(tmp_path):
    from safetensors.numpy import load_file

    cfg = UNIFORM["plain"]
    params = random(cfg, "bfloat16")
    models.save(tmp_path, params, cfg)
    tensors = load_file(tmp_path / "model.safetensors")
    q = np.asarray(params["run_0"]["q"][1])  # dkgh
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.q_proj.weight"], q.reshape(32, 32).T)


@pytest.mark.parametrize(("folder", "file"), [(0o755, 0o644), (0o770, 0o660), (0o700, 0o600)])
def test_weights_are_as_readable_as_their_folder(tmp_path, folder, file):
    tmp_path.chmod(folder)
    models.save(tmp_path, random(config()), config())
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == file


def test_weights_that_cannot_be_written(tmp_path):
    (tmp_path / "model.safetensors" / "in_the_way").mkdir(parents=True)
    with pytest.raises(OSError, match="model.safetensors: cannot be written") as e:
        models.save(tmp_path, random(config()), config())
    assert "\n" not in str(e.value)


def test_params_of_another_model_are_refused_before_anything_is_written(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(ValueError, match=r"run_0.*attn_norm.*\(3, 32\) given.*\(2, 32\)"):
        models.save(folder, random(config()), config([A, A]))
    assert not folder.exists()
