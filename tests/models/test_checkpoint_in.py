"""Folders of transformers: the model that we load computes what transformers computes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import models
from jaxprune.models._families import FAMILIES, OURS

YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LONG = dict(rope_type="longrope", factor=4.0, original_max_position_embeddings=16)
LONG |= dict(short_factor=[1.0, 1.5, 2.0, 2.5], long_factor=[1.0, 3.0, 5.0, 7.0])
ROPES = dict(
    theta=dict(rope_type="default", rope_theta=500.0),
    linear=dict(rope_type="linear", factor=2.0),
    dynamic=dict(rope_type="dynamic", factor=3.0),
    yarn=YARN,
    yarn_settings=YARN | dict(beta_fast=8.0, beta_slow=2.0, attention_factor=1.3),
    longrope=LONG,
    longrope_attention=LONG | dict(attention_factor=1.2),
    llama3=dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
)


def compare(oracle_model, folder, tokens, logits_of):
    params, cfg = models.load(folder)
    ours = models.apply(params, jnp.asarray(tokens), cfg)
    np.testing.assert_allclose(ours, logits_of(oracle_model, tokens), atol=1e-4, rtol=1e-4)
    return params, cfg


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_llama(oracle, saved, tokens, logits_of, kv_heads, tied):
    model = oracle("llama", num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    params, cfg = compare(model, saved(model), tokens, logits_of)
    assert cfg.layers == (models.LayerDims(kv_heads, 4 // kv_heads, 48),) * 3
    assert ("head" in params) == (not tied)


def test_biases_of_llama(oracle, saved, tokens, logits_of):
    model = oracle("llama", attention_bias=True, mlp_bias=True)
    _, cfg = compare(model, saved(model), tokens, logits_of)
    assert cfg.biases == ("q", "k", "v", "o", "gate", "up", "down")


@pytest.mark.parametrize("window", [None, 8])
def test_mistral(oracle, saved, tokens, logits_of, window):
    model = oracle("mistral", sliding_window=window, head_dim=16)
    _, cfg = compare(model, saved(model), tokens, logits_of)
    assert (cfg.sliding_window, cfg.head_dim, cfg.family) == (window, 16, "mistral")


def test_qwen2(oracle, saved, tokens, logits_of):
    model = oracle("qwen2")
    _, cfg = compare(model, saved(model), tokens, logits_of)
    assert (cfg.biases, cfg.family) == (("q", "k", "v"), "qwen2")


@pytest.mark.parametrize("name", ROPES)
def test_rope_scalings(oracle, saved, logits_of, tokens, name):
    settings = dict(rope_parameters=dict(rope_theta=10000.0) | ROPES[name], max_position_embeddings=16, num_hidden_layers=1)
    model = oracle("llama", **settings)
    folder = saved(model)
    for length in (12, 24):
        compare(model, folder, tokens[:, :length], logits_of)


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_both_spellings_of_rope_are_read(name, key):
    base = dict(model_type="llama", vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    base |= dict(intermediate_size=48, max_position_embeddings=64)
    settings = dict(rope_theta=10000.0) | ROPES[name]
    old = {k: v for k, v in settings.items() if k not in ("rope_type", "rope_theta")} | {key: settings["rope_type"]}
    four = models.from_hf_config(base | dict(rope_theta=settings["rope_theta"], rope_scaling=old))
    assert four == models.from_hf_config(base | dict(rope_parameters=settings))
    assert models.from_hf_config(models.to_hf_config(four)) == four


def test_shards(oracle, saved, tokens, logits_of):
    model = oracle("llama")
    folder = saved(model, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    compare(model, folder, tokens, logits_of)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("asked", [None, "float32", "bfloat16"])
def test_dtypes(oracle, saved, stored, asked):
    import torch

    model = oracle("llama").to(getattr(torch, stored))
    params, _ = models.load(saved(model), dtype=asked)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {asked or stored}
    wanted = model.model.embed_tokens.weight.float().detach().numpy()
    np.testing.assert_array_equal(params["embed"], jnp.asarray(wanted).astype(asked or stored))


def test_of_two_dtypes_the_one_that_holds_both(oracle, saved):
    import torch

    model = oracle("llama").to(torch.bfloat16)
    model.model.norm.float()
    params, _ = models.load(saved(model))
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}


def test_place_gets_every_array_once(oracle, saved):
    seen = []
    params, cfg = models.load(saved(oracle("llama")), place=lambda path, x: seen.append((path, x.shape)) or jnp.asarray(x))
    leaves = jax.tree_util.tree_flatten_with_path(models.shapes(cfg))[0]
    assert sorted(seen) == sorted((tuple(k.key for k in path), x.shape) for path, x in leaves)
    assert jax.tree.structure(params) == jax.tree.structure(models.shapes(cfg))


def test_buffers_of_old_checkpoints_and_tied_heads_are_ignored(oracle, saved):
    from safetensors.numpy import load_file, save_file

    folder = saved(oracle("llama", tie_word_embeddings=True))
    tensors = load_file(folder / "model.safetensors")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    extra["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors | extra, folder / "model.safetensors")
    params, _ = models.load(folder)
    assert "head" not in params


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != OURS])
def test_defaults_of_transformers_where_keys_are_left_out(family):
    import transformers

    architecture = FAMILIES[family].architecture
    sizes = dict(vocab_size=64, hidden_size=4096, intermediate_size=48, num_hidden_layers=7, num_attention_heads=32)
    theirs = getattr(transformers, architecture).config_class(**sizes)
    ours = models.from_hf_config(sizes | dict(architectures=[architecture], model_type=family))
    assert ours.layers[0].kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 128)
    assert ours.max_positions == theirs.max_position_embeddings
    assert (ours.norm_eps, ours.tie_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    ends = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
    assert (ours.bos_id, ours.eos_ids) == (theirs.bos_token_id, tuple(end for end in ends if end is not None))
    assert ours.pad_id == theirs.pad_token_id
    kinds = "windowed" in FAMILIES[family].free
    assert ours.sliding_window == (theirs.sliding_window if family in ("mistral", "phi3") or kinds else None)
    assert ours.windowed == (tuple(kind == "sliding_attention" for kind in theirs.layer_types) if kinds else ())
    rope = theirs.rope_parameters
    assert ours.rope_theta == rope.get("full_attention", rope)["rope_theta"]
    assert ours.local_rope_theta == rope.get("sliding_attention", {}).get("rope_theta")
    assert ours.partial_rotary == (rope.get("partial_rotary_factor") or 1.0)
    assert ours.activation == (getattr(theirs, "hidden_act", None) or theirs.hidden_activation)
    caps = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
    assert (ours.score_width, ours.score_cap, ours.logit_cap) == tuple(getattr(theirs, key, None) for key in caps)
    assert bool(ours.biases) == (getattr(theirs, "attention_bias", False) or family == "qwen2")


def test_config_survives_json(oracle):
    config = oracle("llama").config.to_dict()
    assert models.from_hf_config(json.loads(json.dumps(config))) == models.from_hf_config(config)
