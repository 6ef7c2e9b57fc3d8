"""SliceGPT: exact before slicing, best in principal components, a model like any other afterwards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import evaluate, models, plan, proof, recovery, surgery
from jaxprune.models import LayerDims, LlamaConfig, decode
from jaxprune.recovery import slicing

LAYERS = (LayerDims(2, 2, 48),) * 2 + (LayerDims(1, 3, 40),)
KINDS = dict(
    plain=dict(),
    tied=dict(tie_embeddings=True),
    qk_norm=dict(qk_norm=True, partial_rotary=0.5),
    kinds=dict(sliding_window=3, windowed=(True, False, True), local_rope_theta=50.0, score_cap=1.0, logit_cap=2.0),
    gemma=dict(norm_offset=True, embed_scale=6.0, activation="gelu_pytorch_tanh", tie_embeddings=True),
    biases=dict(biases=("q", "k", "v", "o", "gate", "up", "down")),
    gone=dict(layers=(LayerDims(2, 2, 0), LayerDims(0, 0, 0), LayerDims(0, 0, 48)), biases=("o",)),
)
ONE = LAYERS[:1]
RNG = np.random.default_rng
logits_of = jax.jit(models.apply, static_argnums=2)  # compiled once for all tests that run the same model


def config(**settings) -> LlamaConfig:
    return LlamaConfig(**dict(vocab=64, d=32, head_dim=8, layers=LAYERS) | settings)


def random(cfg, dtype="float32", scale=0.3):
    """Parameters without a one or a zero."""
    draw = RNG(0).normal
    return jax.tree.map(lambda x: jnp.asarray(draw(0, scale, x.shape), dtype), models.shapes(cfg))


def tokens(b=4, t=12, seed=0):
    return jnp.asarray(RNG(seed).integers(0, 64, (b, t)), jnp.int32)


def worst(a, b) -> float:
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


@pytest.mark.parametrize("kind", KINDS)
def test_at_full_width_nothing_changes_in_float64(kind):
    with jax.enable_x64(True):
        cfg = config(**KINDS[kind])
        params = random(cfg, "float64")
        same, same_cfg = recovery.slice_gpt(params, cfg, [tokens(), tokens(seed=2)], 32)
        dense = logits_of(params, tokens(), cfg)
        assert dense.dtype == jnp.float64
        assert worst(logits_of(same, tokens(), same_cfg), dense) < 1e-9


def test_a_sliced_model_can_be_sliced_again():
    with jax.enable_x64(True):
        cfg = config(**KINDS["gone"])
        params = random(cfg, "float64")
        once, once_cfg = recovery.slice_gpt(params, cfg, [tokens()], 24)
        twice, twice_cfg = recovery.slice_gpt(once, once_cfg, [tokens(seed=3)], 24)
        assert twice_cfg == once_cfg
        assert worst(logits_of(twice, tokens(), twice_cfg), logits_of(once, tokens(), once_cfg)) < 1e-9
        assert recovery.slice_gpt(once, once_cfg, [tokens()], 16)[1].norm_width == 32


def test_at_full_width_nothing_changes_in_float32():
    cfg = config(**KINDS["tied"], layers=ONE)
    params = random(cfg)
    same, same_cfg = recovery.slice_gpt(params, cfg, [tokens()], 32)
    assert worst(logits_of(same, tokens(), same_cfg), logits_of(params, tokens(), cfg)) < 1e-4


def in_subspace(params, basis):
    """The same model, of which all that writes the stream writes in `basis` only: d x rank, orthonormal."""
    project = basis @ basis.T
    runs = {r: x | {n: x[n] @ project for n in ("o", "down")} for r, x in params.items() if r.startswith("run")}
    return params | runs | dict(embed=params["embed"] @ project)


def test_directions_that_the_stream_never_takes_are_sliced_without_loss():
    with jax.enable_x64(True):
        cfg = config(layers=ONE)
        params = in_subspace(random(cfg, "float64"), np.linalg.qr(RNG(1).normal(size=(32, 16)))[0])
        small, small_cfg = recovery.slice_gpt(params, cfg, [tokens()], 16)
        assert worst(logits_of(small, tokens(seed=5), small_cfg), logits_of(params, tokens(seed=5), cfg)) < 1e-9


def test_fewer_tokens_than_channels_are_reproduced_at_that_width():
    with jax.enable_x64(True):
        cfg = config(layers=ONE)
        params = random(cfg, "float64")
        few = jnp.repeat(tokens(1), 4, 0)  # 12 tokens
        small, small_cfg = recovery.slice_gpt(params, cfg, [few], 16)
        assert worst(logits_of(small, few, small_cfg), logits_of(params, few, cfg)) < 1e-9
        assert bool(jnp.isfinite(logits_of(small, tokens(), small_cfg)).all())


def test_a_stream_of_zeros_has_no_rank_and_does_no_harm():
    cfg = config(layers=ONE)
    params = jax.tree.map(jnp.zeros_like, random(cfg))
    small, small_cfg = recovery.slice_gpt(params, cfg, [tokens()], 16)
    assert not np.any(logits_of(small, tokens(), small_cfg))


def random_directions(stream, width, where):
    return jnp.asarray(np.linalg.qr(RNG(len(where)).normal(size=(32, 32)))[0][:, :width], jnp.float32)


def test_principal_components_lose_less_than_random_directions(monkeypatch):
    cfg = config(layers=LAYERS[:2])
    params = random(cfg)
    spectrum = np.float32(0.8) ** np.arange(32)
    params = params | dict(embed=params["embed"] * spectrum @ np.linalg.qr(RNG(2).normal(size=(32, 32)))[0].astype(np.float32))
    held_out = tokens(seed=7)
    dense = logits_of(params, held_out, cfg)

    def error(width):
        small, small_cfg = recovery.slice_gpt(params, cfg, [tokens(), tokens(seed=3)], width)
        return float(jnp.square(logits_of(small, held_out, small_cfg) - dense).mean())

    principal = [error(width) for width in (16, 24)]
    assert principal[0] > principal[1]
    monkeypatch.setattr(slicing, "_components", random_directions)
    assert 2 * principal[0] < error(16) and 2 * principal[1] < error(24)


@pytest.fixture(scope="module")
def sliced():
    cfg = config(**KINDS["biases"])
    return recovery.slice_gpt(random(cfg), cfg, [tokens()], 24)


def test_a_sliced_model_has_the_arrays_that_its_configuration_says(sliced):
    params, cfg = sliced
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, models.shapes(cfg))
    assert (cfg.d, cfg.norm_width, cfg.shortcuts, cfg.tie_embeddings) == (24, 32, True, False)
    assert models.count_parameters(cfg) == sum(x.size for x in jax.tree.leaves(params))
    matrices = [n for n in models.axes.LAYER if n in models.axes.MATRICES or n in models.axes.SHORTCUTS]
    stored = sum(params[run.name][n].size for run in cfg.runs for n in matrices)
    assert stored == cfg.decoder_parameters == evaluate.sizes(params, cfg)["decoder_parameters"]


def test_the_cache_and_the_flax_module_compute_the_same(sliced):
    params, cfg = sliced
    whole = logits_of(params, tokens(), cfg)
    np.testing.assert_allclose(models.Llama(cfg).apply({"params": params}, tokens()), whole, atol=1e-5, rtol=1e-5)
    logits, cache = decode.prefill(params, tokens()[:, :8], cfg, decode.init_cache(cfg, 4, 12))
    for t in range(8, 12):
        np.testing.assert_allclose(logits, whole[:, t - 1], atol=1e-4, rtol=1e-4)
        logits, cache = decode.step(params, tokens()[:, t], t, cfg, cache)
    np.testing.assert_allclose(logits, whole[:, -1], atol=1e-4, rtol=1e-4)


def test_what_is_observed_leads_to_the_final_stream(sliced):
    params, cfg = sliced
    sites = models.observe(params, tokens(), lambda sites: {a: (s.read, s.after) for a, s in sites.items()}, cfg)
    final = models.rms_norm(sites[-1]["f"][1], params["norm"], cfg.norm_eps, width=cfg.norm_width)
    np.testing.assert_allclose(final, models.hidden(params, tokens(), cfg), atol=1e-5, rtol=1e-5)
    squares = (sites[0]["f"][0] ** 2).sum(-1)  # of the stream over its mean square in the dense width
    np.testing.assert_allclose(squares, cfg.norm_width, rtol=1e-3)


def test_new_shortcuts_are_the_identity():
    cfg = config(layers=ONE, shortcuts=True)
    initial = jax.jit(models.Llama(cfg).init)
    for params in (models.init(jax.random.key(0), cfg), initial(jax.random.key(0), tokens())["params"]):
        plain = {r: {n: a for n, a in x.items() if n not in models.axes.SHORTCUTS} for r, x in params.items() if "run" in r}
        expected = logits_of(params | plain, tokens(), config(layers=ONE))
        np.testing.assert_allclose(logits_of(params, tokens(), cfg), expected, atol=1e-6)


def test_the_same_bits_come_back_from_disk(sliced, tmp_path):
    import transformers

    params, cfg = jax.tree.map(lambda x: x.astype(jnp.bfloat16), sliced[0]), sliced[1]
    models.save(tmp_path / "hf", params, cfg)
    models.save_flax_msgpack(tmp_path / "flax", params, cfg)
    for again, read in (models.load(tmp_path / "hf"), models.load_flax_msgpack(tmp_path / "flax")):
        assert read == cfg
        assert jax.tree.structure(again) == jax.tree.structure(params)
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True))
    for kind in ("AutoModelForCausalLM", "LlamaForCausalLM"):
        with pytest.raises((ValueError, RuntimeError, ZeroDivisionError)):
            getattr(transformers, kind).from_pretrained(tmp_path / "hf")


def test_the_names_in_the_file_and_in_its_configuration(tmp_path):
    from safetensors.numpy import load_file

    cfg = config(layers=LAYERS[:2])  # equal layers, which transformers would load without the shortcuts
    small, small_cfg = recovery.slice_gpt(random(cfg), cfg, [tokens()], 24)
    models.save(tmp_path, small, small_cfg)
    stored = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(stored["model.layers.1.attn_shortcut.weight"], small["run_0"]["attn_shortcut"][1].T)
    np.testing.assert_array_equal(stored["model.layers.0.mlp_shortcut.weight"], small["run_0"]["mlp_shortcut"][0].T)
    written = models.to_hf_config(small_cfg)
    assert (written["model_type"], written["hidden_size"], written["num_attention_heads"]) == ("jaxprune_llama", 24, 0)
    assert (written["jaxprune_shortcuts"], written["jaxprune_norm_width"]) == (True, 32)
    assert not {"jaxprune_shortcuts", "jaxprune_norm_width"} & (models.to_hf_config(cfg) | models.to_hf_config(config())).keys()
    with pytest.raises(ValueError, match="jaxprune_norm_width 0 given; it must be a positive whole number"):
        models.from_hf_config(written | dict(jaxprune_norm_width=0))


PLANS = dict(
    widths=({"k": [1], "f": range(3, 40)}, {"f": [0]}, {"f": range(0, 40, 2)}),
    sublayers=({"k": []}, {"k": [], "f": []}, {"f": []}),
    residual=({"d": range(1, 20)},) * 3,
)


@pytest.mark.parametrize("name", PLANS)
def test_cutting_a_sliced_model_equals_gating_it(name):
    cfg = config(shortcuts=True, norm_width=40)
    params = random(cfg)
    keep = plan.Plan(PLANS[name], models.unit_counts(cfg, "kfd" if name == "residual" else "kf"))
    small, small_cfg = surgery.cut(params, cfg, keep)
    report = proof.verify(params, cfg, small, small_cfg, keep, tokens())
    assert report.exact and not report.updated and report.difference < 1e-5 * report.largest_logit


def test_reconstruction_counts_shortcuts_and_biases_as_there_already(sliced):
    params, cfg = sliced
    run = params["run_0"]
    params = params | {"run_0": run | {"down": run["down"].at[0, 40:].set(0)}}
    fitted, _ = recovery.reconstruct(
        params, cfg, ({"f": range(40)}, {}, {}), [tokens(), tokens(seed=8), tokens(seed=9)], target="residual"
    )
    np.testing.assert_allclose(fitted["run_0"]["down"][0], params["run_0"]["down"][0], atol=1e-3)


def test_verify_says_that_a_rotation_is_no_selection():
    cfg = config()
    params = random(cfg)
    small, small_cfg = recovery.slice_gpt(params, cfg, [tokens()], 24)
    keep = plan.Plan(({"d": range(24)},) * 3, models.unit_counts(cfg, "kfd"))
    with pytest.raises(ValueError, match=r"is rotated \(SliceGPT\), so the pruned model is no selection of units"):
        proof.verify(params, cfg, small, small_cfg, keep, tokens())


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5])
def test_the_width_for_a_ratio_is_the_nearest(ratio):
    cfg = LlamaConfig(vocab=64, d=576, head_dim=64, layers=(LayerDims(3, 3, 1536),) * 30)
    kept = [dataclasses.replace(cfg, d=d, shortcuts=True).decoder_parameters for d in range(8, 577, 8)]
    width = recovery.sliced_width(cfg, ratio)
    off = [abs(n - (1 - ratio) * cfg.decoder_parameters) for n in kept]
    assert width % 8 == 0 and off[width // 8 - 1] == min(off) < 0.02 * cfg.decoder_parameters
    assert width < (1 - ratio) * cfg.d


@pytest.mark.parametrize(("sliced_away", "kept"), [(0.1, 1.029), (0.2, 0.904), (0.25, 0.844), (0.3, 0.783), (0.5, 0.55)])
def test_parameters_of_llama_7b_at_the_widths_of_the_paper(sliced_away, kept):
    """`kept` is with a head as wide as the dense one, as in the released code."""
    cfg = LlamaConfig(vocab=32000, d=4096, head_dim=128, layers=(LayerDims(32, 1, 11008),) * 32)
    width = int((1 - sliced_away) * 4096) // 8 * 8
    small = dataclasses.replace(cfg, d=width, shortcuts=True, norm_width=4096)
    head = (4096 - width) * 32000
    assert (models.count_parameters(small) + head) / models.count_parameters(cfg) == pytest.approx(kept, abs=1e-3)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.0, 0.99, float("nan")])
def test_ratios_that_no_width_meets(ratio):
    with pytest.raises(ValueError, match=rf"ratio: {ratio} given; possible .* more than 0 and at most 0\.[67]\d+"):
        recovery.sliced_width(config(), ratio)


def test_a_stream_too_narrow_to_slice():
    with pytest.raises(ValueError, match=r"\(d = 8\) to a multiple of 8 is none"):
        recovery.sliced_width(config(d=8), 0.2)


def test_bad_input():
    cfg = config()
    params = random(cfg)
    for width in (0, 33):
        with pytest.raises(ValueError, match=f"width: {width} given; allowed is 1 to 32"):
            recovery.slice_gpt(params, cfg, [tokens()], width)
    with pytest.raises(ValueError, match="batches: none given"):
        recovery.slice_gpt(params, cfg, [], 24)
    bad = params | {"run_0": params["run_0"] | {"down": params["run_0"]["down"].at[1, 0, 0].set(jnp.inf)}}
    with pytest.raises(ValueError, match="the residual stream after layer 1 is not finite"):
        recovery.slice_gpt(bad, cfg, [tokens()], 24)
    with pytest.raises(ValueError, match="norm_width: 0 given"):
        config(norm_width=0)
