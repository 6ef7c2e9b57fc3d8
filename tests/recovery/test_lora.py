import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import models
from jaxprune.models import axes
from jaxprune.recovery import lora

logits = jax.jit(models.apply, static_argnames="cfg")


@pytest.fixture
def make(tiny):
    """Parameters of its own, for tests that donate them, and a new adapter."""

    def make(dtype=jnp.float32, **options):
        params = jax.tree.map(lambda x: jnp.array(x, dtype), tiny.params)
        return params, lora.init(jax.random.key(1), params, tiny.cfg, **options)

    return make


def shaken(adapter):
    """An adapter whose `b` is no longer zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + jnp.array(rng.normal(0, 0.1, x.shape), x.dtype), adapter)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_new_adapter_changes_no_bit(tiny, make, dtype):
    params, adapter = make(dtype)
    chex.assert_trees_all_equal(
        logits(lora.overlay(params, adapter, alpha=16), tiny.tokens, cfg=tiny.cfg), logits(params, tiny.tokens, cfg=tiny.cfg)
    )


def test_adapters_stand_only_on_targets_that_the_layer_has():
    layers = (models.LayerDims(1, 2, 8), models.LayerDims(0, 0, 8), models.LayerDims(0, 0, 0), models.LayerDims(1, 2, 0))
    cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=layers)
    adapter = lora.init(jax.random.key(0), models.shapes(cfg), cfg, targets=("k", "down"), rank=3)
    attention, mlp = {"k_a", "k_b"}, {"down_a", "down_b"}
    assert {run: set(arrays) for run, arrays in adapter.items()} == {"run_0": attention | mlp, "run_1": mlp, "run_3": attention}


def test_every_layer_and_matrix_starts_from_its_own_numbers(make):
    _, adapter = make()
    a = adapter["run_0"]
    assert not np.allclose(a["q_a"][0], a["q_a"][1])
    assert not np.allclose(a["q_a"], a["k_a"])
    for name in axes.MATRICES:
        fan_in = np.prod(a[f"{name}_a"].shape[1:-1])
        assert 0.8 < np.abs(a[f"{name}_a"]).max() * fan_in**0.5 <= 1
        assert not a[f"{name}_b"].any()


@pytest.mark.parametrize("donate", [False, True])
def test_merged_and_overlaid_models_agree(tiny, make, donate):
    params, adapter = make(rank=4)
    adapter = shaken(adapter)
    expected = logits(lora.overlay(params, adapter, alpha=8), tiny.tokens, cfg=tiny.cfg)
    dense = logits(params, tiny.tokens, cfg=tiny.cfg)
    merged = lora.merge(params, adapter, alpha=8, donate=donate)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, models.shapes(tiny.cfg))
    np.testing.assert_allclose(logits(merged, tiny.tokens, cfg=tiny.cfg), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - dense).max() > 0.01
    assert params["run_0"]["q"].is_deleted() == donate


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zeros_of_a_sparse_model_stay_zero_and_merged_and_overlaid_models_agree(tiny, make, dtype):
    params, adapter = make(dtype, rank=4)
    params = jax.tree.map(lambda x: x * (jnp.arange(x.shape[-1]) % 2).astype(x.dtype) if x.ndim > 2 else x, params)
    adapter = shaken(adapter)
    merged = lora.merge(params, adapter, alpha=8, sparse=True)
    for run in merged.keys() & adapter.keys():
        for name in axes.MATRICES:
            assert not merged[run][name][params[run][name] == 0].any()
            assert (merged[run][name] != params[run][name]).mean() > 0.4
    if dtype == jnp.float32:
        overlaid = lora.overlay(params, adapter, alpha=8, sparse=True)
        got = logits(merged, tiny.tokens, cfg=tiny.cfg)
        np.testing.assert_allclose(got, logits(overlaid, tiny.tokens, cfg=tiny.cfg), rtol=1e-4, atol=1e-5)
        free = logits(lora.overlay(params, adapter, alpha=8), tiny.tokens, cfg=tiny.cfg)
        assert np.abs(got - free).max() > 0.01


def test_donated_merge_frees_only_what_it_replaces(make):
    params, adapter = make(targets=("q",))
    merged = lora.merge(params, shaken(adapter), alpha=8, donate=True)
    assert params["run_0"]["q"].is_deleted()
    assert merged["run_0"]["k"] is params["run_0"]["k"]


@pytest.mark.parametrize("name", axes.MATRICES)
def test_merging_changes_a_matrix_by_its_rank(make, name):
    params, adapter = make(rank=2)
    merged = lora.merge(params, shaken(adapter), alpha=8)
    inputs = len(axes.INPUT[name])
    for after, before in zip(merged["run_0"][name], params["run_0"][name], strict=True):
        change = np.asarray(after - before, np.float64)
        singular = np.linalg.svd(change.reshape(np.prod(change.shape[:inputs]), -1), compute_uv=False)
        assert singular[1] > 1e-3 and singular[2] < 1e-6


def test_merging_a_bfloat16_model_rounds_once(make):
    params, adapter = make(jnp.bfloat16)
    adapter = shaken(adapter)
    merged = lora.merge(params, adapter, alpha=16)
    run = adapter["run_0"]
    product = jnp.einsum("ldr,lrf->ldf", run["up_a"], run["up_b"], precision="highest") * 2
    exact = params["run_0"]["up"].astype(jnp.float32) + product
    error = jnp.abs(merged["run_0"]["up"].astype(jnp.float32) - exact)
    assert merged["run_0"]["up"].dtype == jnp.bfloat16
    assert (error <= jnp.abs(exact) * 2.0**-8 + 1e-6).all()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rank=0), "rank: 0 given"),
        (dict(targets=("q", "mlp")), r"targets: \['mlp'\] given; choose from q, k"),
        (dict(targets=()), "targets: none given"),
    ],
)
def test_bad_options_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_targets_that_the_whole_model_lacks_are_refused():
    cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(0, 0, 8),))
    with pytest.raises(ValueError, match="no layer of this model has any"):
        lora.init(jax.random.key(0), models.shapes(cfg), cfg, targets=("q",))


def test_parameters_of_another_config_are_refused(tiny):
    other = dataclasses.replace(tiny.cfg, layers=tiny.cfg.layers[:2])
    with pytest.raises(AssertionError):
        lora.init(jax.random.key(0), tiny.params, other)
