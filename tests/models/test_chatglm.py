"""ChatGLM3 and GLM-4-9B as first published: read as the GLM that they are, and written as it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxprune import cli, models, plan, surgery
from jaxprune.models._families import OURS

TOP = {
    "model.embed_tokens.weight": "transformer.embedding.word_embeddings.weight",
    "model.norm.weight": "transformer.encoder.final_layernorm.weight",
    "lm_head.weight": "transformer.output_layer.weight",
}
IN_LAYER = {
    "mlp.gate_up_proj.weight": "mlp.dense_h_to_4h.weight",
    "mlp.down_proj.weight": "mlp.dense_4h_to_h.weight",
    "self_attn.o_proj.weight": "self_attention.dense.weight",
}
KINDS = {
    "chatglm3": (dict(head_dim=16), {}),
    "glm-4-9b": (dict(head_dim=8, rope_parameters=dict(rope_type="default", rope_theta=5e6, partial_rotary_factor=0.5)), {}),
    "no-biases": (dict(head_dim=16, attention_bias=False), dict(architectures=["ChatGLMForConditionalGeneration"])),
    "all-heads": (dict(head_dim=8, num_key_value_heads=4), {}),
    "tied": (dict(head_dim=16, tie_word_embeddings=True), dict(architectures=None)),
}
logits = jax.jit(models.apply, static_argnames="cfg")


def to_chatglm(folder, **changes):
    """Rewrites a folder of GlmForCausalLM as ChatGLM's own code has it."""
    theirs = json.loads((folder / "config.json").read_text())
    config = dict(
        architectures=["ChatGLMModel"],
        model_type="chatglm",
        num_layers=theirs["num_hidden_layers"],
        hidden_size=theirs["hidden_size"],
        ffn_hidden_size=theirs["intermediate_size"],
        num_attention_heads=theirs["num_attention_heads"],
        multi_query_attention=True,
        multi_query_group_num=theirs["num_key_value_heads"],
        kv_channels=theirs["head_dim"],
        padded_vocab_size=theirs["vocab_size"],
        seq_length=theirs["max_position_embeddings"],
        layernorm_epsilon=theirs["rms_norm_eps"],
        add_qkv_bias=theirs["attention_bias"],
        add_bias_linear=False,
        rmsnorm=True,
        apply_residual_connection_post_layernorm=False,
        post_layer_norm=True,
        original_rope=True,
        rope_ratio=theirs["rope_parameters"]["rope_theta"] / 10000,
        tie_word_embeddings=theirs["tie_word_embeddings"],
        eos_token_id=2,
        pad_token_id=0,
    )
    (folder / "config.json").write_text(json.dumps(config | changes))
    before = load_file(folder / "model.safetensors")
    after = {TOP[name]: x for name, x in before.items() if name in TOP}
    for i in range(config["num_layers"]):
        here, there = f"model.layers.{i}.", f"transformer.encoder.layers.{i}."
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            after[there + name] = before[here + name]
        after |= {there + new: before[here + old] for old, new in IN_LAYER.items()}
        for kind in ("weight", "bias") if config["add_qkv_bias"] else ("weight",):
            parts = [before[f"{here}self_attn.{n}_proj.{kind}"] for n in "qkv"]
            after[f"{there}self_attention.query_key_value.{kind}"] = np.concatenate(parts)
    after.setdefault(TOP["lm_head.weight"], after[TOP["model.embed_tokens.weight"]])  # is stored, too, where it is tied
    after["transformer.rotary_pos_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(after, folder / "model.safetensors")
    return folder


@pytest.fixture
def made(oracle, saved):
    """kind -> the torch model of GLM and its folder in ChatGLM's layout."""

    def make(kind):
        settings, changes = KINDS[kind]
        model = oracle("glm", **settings)
        return model, to_chatglm(saved(model), **changes)

    return make


def glm_of(folder):
    import transformers

    model, info = transformers.GlmForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_glm(made, kind, tokens, logits_of):
    model, folder = made(kind)
    params, cfg = models.load(folder)
    np.testing.assert_allclose(logits(params, jnp.asarray(tokens), cfg), logits_of(model, tokens), atol=1e-4, rtol=1e-4)
    assert (cfg.family, cfg.bos_id, cfg.eos_ids, cfg.pad_id) == ("glm", None, (2,), 0)
    assert models.from_hf_config(json.loads((folder / "config.json").read_text())) == cfg


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_the_folder_of_glm(made, kind, tmp_path, tokens, logits_of):
    model, folder = made(kind)
    models.save(tmp_path / "again", *models.load(folder))
    theirs = glm_of(tmp_path / "again")
    np.testing.assert_allclose(logits_of(theirs, tokens), logits_of(model, tokens), atol=1e-5)
    before = model.state_dict()
    for name, x in theirs.state_dict().items():
        np.testing.assert_array_equal(x, before[name], err_msg=name)


def test_equal_layers_are_written_as_glm(made, tmp_path, tokens, logits_of):
    params, cfg = models.load(made("chatglm3")[1])
    keep = plan.Plan(
        ({"k": [0], "f": range(0, 40, 2)}, {"k": [1], "f": range(20)}, {"k": [1], "f": range(20, 40)}), models.unit_counts(cfg)
    )
    small, small_cfg = surgery.cut(params, cfg, keep)
    masked = logits(params, jnp.asarray(tokens), cfg, surgery.gates_of(keep, cfg))
    models.save(tmp_path / "small", small, small_cfg)
    np.testing.assert_allclose(logits_of(glm_of(tmp_path / "small"), tokens), masked, atol=1e-4, rtol=1e-4)


def test_layers_that_differ_are_written_as_our_own(made, tmp_path, tokens):
    params, cfg = models.load(made("chatglm3")[1])
    keep = plan.Plan(({"k": [1], "f": range(0, 40, 2)}, {"f": []}, {"k": []}), models.unit_counts(cfg))
    small, small_cfg = surgery.cut(params, cfg, keep)
    masked = logits(params, jnp.asarray(tokens), cfg, surgery.gates_of(keep, cfg))
    models.save(tmp_path / "small", small, small_cfg)
    assert json.loads((tmp_path / "small" / "config.json").read_text())["model_type"] == OURS
    again, read = models.load(tmp_path / "small")
    assert read == small_cfg
    np.testing.assert_allclose(logits(again, jnp.asarray(tokens), read), masked, atol=2e-5, rtol=2e-5)


def test_the_command_line_prunes_it_with_token_ids(made, tmp_path, tokens, capsys):
    """Its tokenizer is in the folder and cannot be read."""
    folder = made("chatglm3")[1]
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="ChatGLM4Tokenizer")))
    (folder / "tokenizer.model").write_text("IQ== 0\n")
    np.save(tmp_path / "tokens.npy", tokens)
    words = ["prune", folder, "--method", "taylor", "--ratio", 0.3]
    for data, out, status in ((tmp_path / "tokens.npy", "small", 0), ("builtin", "none", 2)):
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(word) for word in (*words, "--calibration", data, "--out", tmp_path / out)])
        assert stopped.value.code == status, capsys.readouterr()
    assert "ChatGLM4Tokenizer is Python code of the checkpoint" in capsys.readouterr().err
    glm_of(tmp_path / "small")


@pytest.mark.parametrize("named", ["ChatGLMTokenizer", "ChatGLM4Tokenizer"])
def test_its_tokenizer_is_code_and_refused(tmp_path, named):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class=named)))
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(FileNotFoundError, match=f"{named} is Python code .* or give token ids as FILE.npy") as e:
        models.load_tokenizer(tmp_path)
    assert "\n" not in str(e.value)


def test_tensors_that_do_not_fit_are_named_as_in_the_file(made):
    folder = made("chatglm3")[1]
    name = "transformer.encoder.layers.1.self_attention.query_key_value.bias"
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: tensors[name][:-1].copy()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"tensor {name} has shape \(127,\); its configuration says \(128,\)"):
        models.load(folder)
    extra = {"transformer.prefix_encoder.embedding.weight": np.ones((2, 2), np.float32)}
    save_file(tensors | extra, folder / "model.safetensors")
    with pytest.raises(ValueError, match="tensor transformer.prefix_encoder.embedding.weight has no place"):
        models.load(folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(multi_query_attention=False), "multi_query_attention False given .*head by head.* allowed is True"),
        (
            dict(rmsnorm=False),
            r"rmsnorm False given \(its norms are LayerNorm\); allowed is True; use a ChatGLM3-6B or GLM-4-9B",
        ),
        (dict(post_layer_norm=False), "post_layer_norm False given .* allowed is True"),
        (dict(apply_residual_connection_post_layernorm=True), "apply_residual_connection_post_layernorm True given .* False"),
        (dict(add_bias_linear=True), "add_bias_linear True given .* allowed is False"),
        (dict(original_rope=False), "original_rope False given .* allowed is True"),
        (dict(pre_seq_len=128), r"pre_seq_len 128 given \(it has a prefix encoder\); allowed is None"),
        (dict(quantization_bit=4), r"quantization_bit 4 given \(it is quantised\); allowed is 0"),
        (dict(position_encoding_2d=True), "position_encoding_2d True given .*ChatGLM-6B, the first"),
        (dict(inner_hidden_size=64), "inner_hidden_size 64 given .*ChatGLM-6B, the first"),
        (dict(vision_config=dict(width=8)), r"vision_config an object given \(it reads images\)"),
        (dict(rope_scaling=dict(rope_type="linear", factor=2.0)), "rope_scaling an object given"),
        (dict(rope_ratio=50, padded_vocab_size=65024), "rope_ratio 50.0 given; ChatGLM2 divides positions by it.* set"),
        (dict(rope_ratio="50"), "rope_ratio '50' given; it must be a positive number"),
        (dict(ffn_hidden_size=None), "ffn_hidden_size None given; it must be a positive whole number"),
        (dict(multi_query_group_num=3), "4 heads for 3 key/value heads"),
        (
            dict(architectures=["ChatGLMForSequenceClassification"]),
            "'ChatGLMForSequenceClassification' is not supported; .*ChatGLMModel",
        ),
    ],
)
def test_what_glm_cannot_be_is_refused(made, changes, match):
    config = json.loads((made("chatglm3")[1] / "config.json").read_text())
    with pytest.raises(ValueError, match=match) as e:
        models.from_hf_config(config | changes)
    assert "\n" not in str(e.value)


def test_settings_that_chatglm_leaves_open(made):
    config = json.loads((made("chatglm3")[1] / "config.json").read_text())
    long = config | dict(rope_ratio=50, padded_vocab_size=65024, _name_or_path="THUDM/chatglm3-6b-32k")
    assert models.from_hf_config(long).rope_theta == 500000.0
    with pytest.raises(ValueError, match="multi_query_attention False given"):
        models.from_hf_config({k: v for k, v in config.items() if k != "multi_query_attention"})
    bare = models.from_hf_config({k: v for k, v in config.items() if k not in ("rope_ratio", "eos_token_id", "pad_token_id")})
    assert (bare.rope_theta, bare.eos_ids, bare.pad_id) == (10000.0, (), None)
