"""The Linen module has the parameters of the library and computes its functions."""

import chex
import flax
import jax
import numpy as np
import pytest

from jaxprune import models
from jaxprune.models import LayerDims, LlamaConfig


def test_it_computes_apply(tiny):
    module = models.Llama(tiny.cfg)
    ours = models.apply(tiny.params, tiny.tokens, tiny.cfg)
    np.testing.assert_array_equal(module.apply({"params": tiny.params}, tiny.tokens), ours)
    gates = models.probes(tiny.cfg)["gates"]
    gates[1]["k"] = gates[1]["k"].at[0].set(0.0)
    gated = module.apply({"params": tiny.params}, tiny.tokens, dict(gates=gates), remat=True)
    np.testing.assert_array_equal(gated, models.apply(tiny.params, tiny.tokens, tiny.cfg, dict(gates=gates), remat=True))
    assert np.abs(gated - ours).max() > 1e-3


@pytest.mark.parametrize(
    "cfg",
    [
        LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 48), LayerDims(0, 0, 0), LayerDims(0, 0, 40))),
        LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 48),) * 2, tie_embeddings=True, biases=("q", "down")),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_declares_the_shapes_of_the_library(cfg, dtype):
    tokens = jax.numpy.zeros((1, 4), int)
    declared = jax.eval_shape(models.Llama(cfg, dtype).init, jax.random.key(0), tokens)
    chex.assert_trees_all_equal_shapes_and_dtypes(declared["params"], models.shapes(cfg, dtype))


def test_it_initialises_as_init_does():
    cfg = LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 48),) * 2, tie_embeddings=True, biases=("q", "down"))
    variables = jax.jit(models.Llama(cfg).init)(jax.random.key(0), jax.numpy.zeros((1, 4), int))
    for path, x in jax.tree_util.tree_flatten_with_path(variables["params"])[0]:
        name = path[-1].key
        if name.endswith(("norm", "_bias")):
            np.testing.assert_array_equal(x, float(name.endswith("norm")))
        else:
            assert 0.015 < float(np.asarray(x, np.float32).std()) < 0.025


@pytest.mark.parametrize(
    "stale",
    [
        (LayerDims(2, 2, 48),) * 3,
        (LayerDims(2, 2, 48),) * 2 + (LayerDims(1, 1, 40),),
        (LayerDims(2, 2, 48),) * 2 + (LayerDims(1, 2, 32),),
    ],
)
def test_a_stale_configuration_is_an_error(tiny, stale):
    cfg = LlamaConfig(vocab=64, d=32, head_dim=8, layers=stale)
    with pytest.raises(flax.errors.ScopeParamShapeError, match="run_"):
        models.Llama(cfg).apply({"params": tiny.params}, tiny.tokens)


def test_gradients_flow_through_the_module(tiny):
    @jax.jit
    @jax.grad
    def gradient(params):
        return models.Llama(tiny.cfg).apply({"params": params}, tiny.tokens).var()

    chex.assert_trees_all_equal_shapes_and_dtypes(gradient(tiny.params), tiny.params)
