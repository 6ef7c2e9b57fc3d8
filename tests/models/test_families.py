"""Every family of the table, with its own settings: read, computed, pruned and written as transformers has it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxprune import cli, models, pipeline, plan, proof, recovery, surgery
from jaxprune.models import decode
from jaxprune.models._families import FAMILIES, OURS

LONG = dict(rope_type="longrope", rope_theta=10000.0, short_factor=[1.0, 1.5, 2.0, 2.5], long_factor=[1.0, 3.0, 5.0, 7.0])
WHOLE = dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=1.0)
CAPS = dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
BY_KIND = dict(
    full_attention=dict(rope_type="linear", rope_theta=500.0, factor=4.0),
    sliding_attention=dict(rope_type="default", rope_theta=50.0),
)
KINDS = {  # a new family is a line here
    "llama": ("llama", dict(attention_bias=True)),
    "mistral": ("mistral", dict(sliding_window=8, head_dim=16)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(head_dim=16)),
    "qwen3-biases": ("qwen3", dict(head_dim=8, attention_bias=True, tie_word_embeddings=True)),
    "phi3": ("phi3", dict(sliding_window=8)),
    "phi3-partial": ("phi3", dict(rope_parameters=dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=0.75))),
    "phi3-long": ("phi3", dict(rope_parameters=LONG, original_max_position_embeddings=16)),
    "glm": ("glm", dict(head_dim=16)),
    "glm-whole": ("glm", dict(head_dim=8, attention_bias=False, rope_parameters=WHOLE)),
    "glm4": ("glm4", dict(head_dim=16)),
    "gemma": ("gemma", dict(head_dim=16)),
    "gemma2": ("gemma2", dict(head_dim=16, sliding_window=8, query_pre_attn_scalar=24) | CAPS),
    "gemma2-full": ("gemma2", dict(head_dim=8, layer_types=["full_attention"] * 3, attn_logit_softcapping=None)),
    "gemma3": ("gemma3_text", dict(head_dim=16, sliding_window=8, query_pre_attn_scalar=24, layer_types=TYPES)),
    "gemma3-linear": ("gemma3_text", dict(head_dim=8, layer_types=TYPES, rope_parameters=BY_KIND) | CAPS),
    "gemma-biases": ("gemma", dict(head_dim=8, attention_bias=True, tie_word_embeddings=False)),
}
every = pytest.mark.parametrize("kind", KINDS)
each_family = pytest.mark.parametrize("kind", [family for family in FAMILIES if family != OURS])
logits = jax.jit(models.apply, static_argnames="cfg")


@pytest.fixture
def made(kind, oracle, saved):
    """The torch model and its folder."""
    family, settings = KINDS[kind]
    model = oracle(family, **settings)
    return model, saved(model)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def transformers_of(folder):
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def command(*words):
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(word) for word in words])
    assert stopped.value.code == 0


@every
def test_logits_and_greedy_tokens_are_those_of_transformers(made, kind, tokens, logits_of):
    import torch

    model, folder = made
    params, cfg = models.load(folder)
    assert cfg.family == KINDS[kind][0]
    np.testing.assert_allclose(logits(params, jnp.asarray(tokens), cfg), logits_of(model, tokens), atol=1e-4, rtol=1e-4)
    prompt = torch.tensor(tokens, dtype=torch.long)
    model.generation_config.eos_token_id = None
    theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0)
    np.testing.assert_array_equal(decode.generate(params, cfg, tokens, max_new_tokens=8), theirs[:, tokens.shape[1] :])


@every
def test_what_is_written_is_what_was_read(made, tmp_path, tokens, logits_of):
    model, folder = made
    params, cfg = models.load(folder)
    models.save(tmp_path / "again", params, cfg)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, x in before.items():
        np.testing.assert_array_equal(x, after[name], err_msg=name)
    again, read = models.load(tmp_path / "again")
    assert read == cfg
    same(params, again)
    np.testing.assert_allclose(logits_of(transformers_of(tmp_path / "again"), tokens), logits_of(model, tokens), atol=1e-5)


@every
def test_layers_that_differ_keep_the_settings_of_the_family(made, tmp_path, tokens):
    params, cfg = models.load(made[1])
    keep = plan.Plan(({"k": [1], "f": range(0, 40, 2)}, {"f": []}, {"k": [], "f": range(8)}), models.unit_counts(cfg))
    small, small_cfg = surgery.cut(params, cfg, keep)
    masked = logits(params, jnp.asarray(tokens), cfg, surgery.gates_of(keep, cfg))
    np.testing.assert_allclose(logits(small, jnp.asarray(tokens), small_cfg), masked, atol=2e-5, rtol=2e-5)
    models.save(tmp_path / "small", small, small_cfg)
    assert json.loads((tmp_path / "small" / "config.json").read_text())["model_type"] == OURS
    again, read = models.load(tmp_path / "small")
    assert read == small_cfg
    same(small, again)


@every
def test_residual_channels_are_cut_exactly(made, tokens):
    params, cfg = models.load(made[1])
    keep = plan.Plan(({"d": range(0, 32, 2)},) * 3, models.unit_counts(cfg, "d"))
    masked = logits(params, jnp.asarray(tokens), cfg, surgery.gates_of(keep, cfg))
    small, small_cfg = surgery.cut(params, cfg, keep)
    np.testing.assert_allclose(logits(small, jnp.asarray(tokens), small_cfg), masked, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", ["qwen3", "phi3", "glm4", "gemma", "gemma2", "gemma3"])
def test_the_command_line_prunes_a_folder(made, tmp_path, tokens, logits_of):
    dense, small = made[1], tmp_path / "small"
    np.save(tmp_path / "tokens.npy", tokens)
    flags = ("--method", "taylor", "--ratio", 0.3, "--calibration", tmp_path / "tokens.npy")
    command("prune", dense, "--out", small, *flags)
    command("verify", dense, small, "--text", tmp_path / "tokens.npy", "--length", tokens.shape[1])
    params, cfg = models.load(small)
    assert cfg.decoder_parameters < 0.75 * models.load(dense)[1].decoder_parameters and len(set(cfg.layers)) == 1
    theirs = transformers_of(small)
    np.testing.assert_allclose(logits(params, jnp.asarray(tokens), cfg), logits_of(theirs, tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3", "glm4", "gemma", "gemma2", "gemma3"])
def test_the_default_recipe_prunes_it_and_the_cut_is_exact(made, tokens):
    params, cfg = models.load(made[1])
    settings = pipeline.Settings(ratio=0.3)
    if cfg.post_norms:
        with pytest.raises(ValueError, match="residual given, .*(glm4|gemma[23]).*; allowed are dense, weights and none"):
            pipeline.prune(params, cfg, jnp.asarray(tokens), settings)
        settings = dataclasses.replace(settings, reconstruct="weights")
    made_small = pipeline.prune(params, cfg, jnp.asarray(tokens), settings)
    updates = ("o", "down")
    report = proof.verify(params, cfg, made_small.params, made_small.cfg, made_small.plan, jnp.asarray(tokens), updates)
    assert report.exact, report
    assert dataclasses.replace(made_small.cfg, layers=cfg.layers) == cfg


@pytest.mark.parametrize(
    ("family", "tensor", "part"),
    [("phi3", "self_attn.qkv_proj.weight", "k"), ("glm", "mlp.gate_up_proj.weight", "gate")],
)
def test_tensors_that_hold_several_arrays_are_checked(oracle, saved, family, tensor, part):
    folder = saved(oracle(family, **(dict(head_dim=16) if family == "glm" else {})))
    name = f"model.layers.1.{tensor}"
    tensors = load_file(folder / "model.safetensors")
    rows = len(tensors[name])
    save_file(tensors | {name: tensors[name][:-1].copy()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"tensor {name} has shape \({rows - 1}, 32\); its configuration says \({rows}, 32\)"):
        models.load(folder)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"tensor {name}\[{part}\] is missing"):
        models.load(folder)


def test_what_a_family_cannot_say_another_does(tmp_path, tokens, logits_of):
    """Phi-3's class wants as many divisors as half of hidden_size / heads; LLaMA's does not look."""
    scaling = tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in LONG.items() if k != "rope_theta"))
    cfg = models.LlamaConfig(
        **dict(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(1, 2, 40),) * 2, max_positions=64, family="phi3"),
        rope_scaling=tuple(sorted((*scaling, ("original_max_position_embeddings", 16)))),
    )
    params = jax.tree.map(lambda x: 10 * x, models.init(jax.random.key(0), cfg))
    models.save(tmp_path, params, cfg)
    theirs = transformers_of(tmp_path)
    assert theirs.config.model_type == "llama"
    np.testing.assert_allclose(logits(params, jnp.asarray(tokens), cfg), logits_of(theirs, tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_a_layer_that_is_gone_takes_its_kind_with_it(made, tmp_path, tokens, logits_of):
    params, cfg = models.load(made[1])
    keep = plan.Plan(({}, {"k": [], "f": []}, {}), models.unit_counts(cfg))
    small, small_cfg = surgery.cut(params, cfg, keep)
    assert cfg.windowed == small_cfg.windowed == (True, False, True)
    models.save(tmp_path / "small", small, small_cfg)
    assert models.load(tmp_path / "small")[1] == small_cfg
    theirs = transformers_of(tmp_path / "small")
    assert theirs.config.layer_types == ["sliding_attention"] * 2
    np.testing.assert_allclose(logits(small, jnp.asarray(tokens), small_cfg), logits_of(theirs, tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gemma3", "gemma3-linear"])
def test_a_file_of_transformers_4_says_kinds_by_other_keys(made):
    folder = made[1]
    new = json.loads((folder / "config.json").read_text())
    full, local = (new["rope_parameters"][kind] for kind in ("full_attention", "sliding_attention"))
    rope = dict(
        rope_theta=full["rope_theta"],
        rope_local_base_freq=local["rope_theta"],
        rope_scaling={key: full[key] for key in ("rope_type", "factor")} if "factor" in full else None,
    )
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "layer_types")} | rope
    cfg = models.from_hf_config(new)
    assert models.from_hf_config(old | dict(sliding_window_pattern=2)) == cfg
    written = models.to_hf_config(cfg)
    assert {key: written[key] for key in rope} == rope


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            dict(layer_types=["full_attention"]),
            r"layer_types \['full_attention'\] given; it must be a list of 3, each",
        ),
        (dict(layer_types=["chunked_attention"] * 3), "layer_types .* each full_attention or sliding_attention"),
        (dict(jaxprune_gone_layers=[1]), r"jaxprune_gone_layer_types \[\] given; it must be a list of 1"),
        (dict(sliding_window=None), "layers with a window given without sliding_window"),
        (dict(hidden_activation="gelu"), "hidden_activation 'gelu' is not supported; supported is 'gelu_pytorch_tanh'"),
        (dict(attention_bias=True), r"biases: \['o'\] given with post_norms"),
        (dict(final_logit_softcapping=-1.0), "final_logit_softcapping -1.0 given; it must be a positive number"),
        (dict(query_pre_attn_scalar="24"), "query_pre_attn_scalar '24' given; it must be a positive whole number"),
        (dict(sliding_window_pattern=0, layer_types=None), "sliding_window_pattern 0 given"),
        (
            dict(rope_parameters=dict(sliding_attention=dict(rope_type="linear", factor=2.0))),
            "rope_parameters of sliding_attention have 'linear'; supported is a rope_theta of their own",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["gemma3"])
def test_what_gemma_3_cannot_be_is_refused(made, changes, match):
    config = json.loads((made[1] / "config.json").read_text())
    with pytest.raises(ValueError, match=match):
        models.from_hf_config(config | changes)


def test_gelu_of_the_first_gemma_files_is_its_approximation(oracle, saved):
    folder = saved(oracle("gemma", head_dim=16))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(hidden_act="gelu")))
    assert models.from_hf_config(config) == models.load(folder)[1]


def test_post_norms_refuse_what_they_do_not_allow(oracle, saved, tokens):
    params, cfg = models.load(saved(oracle("glm4", head_dim=16)))
    with pytest.raises(ValueError, match="slicing: the model normalises .*glm4"):
        recovery.slice_gpt(params, cfg, [tokens], 24)
    with pytest.raises(ValueError, match=r"biases: \['down'\] given with post_norms"):
        dataclasses.replace(cfg, biases=("q", "k", "v", "down"))
