"""Mamba: what transformers computes, its recurrence, its files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxprune import models
from jaxprune.models import decode, mamba

SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=3, state_size=4, bos_token_id=None, eos_token_id=None)
KINDS = {
    "plain": dict(),
    "biases": dict(use_bias=True, use_conv_bias=False, tie_word_embeddings=False, time_step_rank=3, conv_kernel=3),
    "width": dict(intermediate_size=40, residual_in_fp32=False, expand=1),
}
CFG = models.MambaConfig(vocab=64, d=32, dt_rank=2, state=4, layers=(models.MambaDims(48),) * 2 + (models.MambaDims(40),))
logits = jax.jit(models.apply, static_argnames="cfg")


@pytest.fixture(scope="module")
def params():
    """Far from the start of training, so that nothing is nearly linear."""
    rng = np.random.default_rng(0)
    drawn = models.init(jax.random.key(0), CFG)
    return jax.tree.map(lambda x: jnp.asarray(x + 0.2 * rng.standard_normal(x.shape).astype(np.float32)), drawn)


@pytest.fixture(params=KINDS)
def theirs(request):
    """A random model of transformers, every array of it random."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES | KINDS[request.param])).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.add_(torch.randn(x.shape) * (0.1 if "A_log" in name else 0.2))
    return model


def test_logits_and_greedy_tokens_are_those_of_transformers_and_the_files_come_back(theirs, saved, tokens, logits_of, tmp_path):
    import torch

    folder = saved(theirs)
    params, cfg = models.load(folder)
    np.testing.assert_allclose(logits(params, jnp.asarray(tokens), cfg), logits_of(theirs, tokens), atol=1e-4, rtol=1e-4)
    prompt = torch.tensor(tokens, dtype=torch.long)
    written = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0)
    np.testing.assert_array_equal(decode.generate(params, cfg, tokens, max_new_tokens=8), written[:, tokens.shape[1] :])

    models.save(tmp_path / "again", params, cfg)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() and before[name].shape == after[name].shape for name in before)
    again, info = type(theirs).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_array_equal(logits_of(again.eval(), tokens), logits_of(theirs, tokens))
    assert models.load(tmp_path / "again")[1] == cfg


def test_padding_on_the_left_changes_nothing_and_transformers_agrees(theirs, saved, tokens):
    import torch

    params, cfg = models.load(saved(theirs))
    pad = np.array([0, 5])
    tokens = np.where(np.arange(24) < pad[:, None], 0, tokens)
    written = decode.generate(params, cfg, tokens, max_new_tokens=6, pad=pad.tolist())
    alone = decode.generate(params, cfg, tokens[1:, 5:], max_new_tokens=6)
    np.testing.assert_array_equal(written[1:], alone)
    if "in_proj" not in cfg.biases:  # theirs adds that bias to padding, too
        mask = torch.tensor(np.arange(24) >= pad[:, None]).long()
        found = theirs.generate(
            torch.tensor(tokens).long(), attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        np.testing.assert_array_equal(written, found[:, 24:])


def test_the_recurrence_is_the_scan(params):
    tokens = jax.random.randint(jax.random.key(2), (2, mamba.CHUNK + 9), 0, CFG.vocab)
    whole = logits(params, tokens, CFG)
    got, cache = decode.prefill(params, tokens[:, :-6], CFG, decode.init_cache(CFG, 2, 1))
    for i in range(tokens.shape[1] - 6, tokens.shape[1]):
        np.testing.assert_allclose(got, whole[:, i - 1], atol=2e-5, rtol=1e-5)
        got, cache = decode.step(params, tokens[:, i], i, CFG, cache)
    np.testing.assert_allclose(got, whole[:, -1], atol=2e-5, rtol=1e-5)


def test_derivatives_by_gates_and_taps_are_those_by_weights(params):
    from jaxprune import scorers

    cfg = dataclasses.replace(CFG, layers=CFG.layers[:2])
    params = {name: x for name, x in params.items() if name != "run_1"}
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, cfg.vocab, (2, 20), np.int32))
    loss, probes = models.loss_fn(cfg), models.probes(cfg)
    taps = scorers.score(scorers.taylor(loss), params, probes, [tokens])
    full = scorers.score(scorers.full_taylor(loss, lambda tree: models.sum_over_units(tree, cfg)), params, probes, [tokens])
    for a, b in zip(taps, full, strict=True):
        np.testing.assert_allclose(a["i"], b["i"], rtol=2e-4)
    step = 1e-2  # the loss along one gate, by differences

    @jax.jit
    def at(gate):
        gates = [dict(layer) for layer in probes["gates"]]
        gates[1]["i"] = gates[1]["i"].at[7].set(gate)
        return loss(params, {"gates": tuple(gates)}, tokens).mean()

    found = scorers.score(scorers.gate_taylor(loss), params, probes, [tokens])[1]["i"][7]
    np.testing.assert_allclose(found, abs(at(1 + step) - at(1 - step)) / (2 * step), rtol=0.02, atol=1e-5)


def test_uneven_layers_come_back_and_transformers_refuses_them(params, tmp_path):
    import transformers

    models.save(tmp_path, params, CFG)
    again, cfg = models.load(tmp_path)
    assert cfg == dataclasses.replace(CFG, eos_ids=(), bos_id=None)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again, params))
    with pytest.raises(ValueError, match="jaxprune_mamba"):
        transformers.AutoConfig.from_pretrained(tmp_path)


def test_bfloat16_keeps_its_states_in_float32(params):
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tokens = jax.random.randint(jax.random.key(4), (1, 12), 0, CFG.vocab)
    _, cache = decode.prefill(narrow, tokens, CFG, decode.init_cache(CFG, 1, 1, jnp.bfloat16))
    assert {name: x.dtype for name, x in cache["run_0"].items()} == dict(conv=jnp.bfloat16, state=jnp.float32)
    want = logits(jax.tree.map(lambda x: x.astype(jnp.float32), narrow), tokens, CFG)
    np.testing.assert_allclose(logits(narrow, tokens, CFG), want, atol=0.03 * float(abs(want).max()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
        (dict(quantization_config=dict(bits=4)), "quantization_config is set"),
        (dict(jaxprune_inner_sizes=[48, 40]), "must be 3 positive whole numbers"),
        (dict(time_step_rank="none"), "time_step_rank 'none' given"),
        (dict(state_size=5), "tensor backbone.layers.0.mixer.A_log has shape"),
        (dict(use_bias=True), "tensor backbone.layers.0.mixer.in_proj.bias is missing"),
        (dict(use_conv_bias=False), "conv1d.bias has no place"),
    ],
)
def test_bad_folders(params, tmp_path, change, message):
    models.save(tmp_path, params, CFG)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        models.load(tmp_path)


def test_damaged_weights(params, tmp_path):
    models.save(tmp_path, params, CFG)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["backbone.layers.1.mixer.A_log"][0, 0] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="A_log holds NaN"):
        models.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(biases=("in_proj",)), "biases"),
        (dict(layers=()), "layers: none given"),
        (dict(layers=(models.MambaDims(4), models.MambaDims(0))), "layer 1: 0 inner channels"),
        (dict(dt_rank=0), "dt_rank: 0 given"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CFG, **change)
