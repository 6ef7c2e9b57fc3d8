"""Methods as the command line knows them, on statistics that would break a naive solver."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import methods, models, pipeline

CFG = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(3, 1, 48),) * 2, tie_embeddings=True)
TOKENS = np.arange(8, dtype=np.int32)[None]  # one short sequence: every second moment lacks rank


def damaged(dtype):
    """A model with dead channels and a dead KV group."""
    params = jax.tree.map(lambda x: 3 * x, models.init(jax.random.key(0), CFG))
    run = params["run_0"]
    run |= dict(up=run["up"].at[:, :, 5:9].set(0), v=run["v"].at[0, :, 1].set(0))
    return jax.tree.map(lambda x: x.astype(dtype), params)


@pytest.mark.parametrize("ratio", [0.5, 0.8])
@pytest.mark.parametrize("method", ["kfac-obs", "numerical", "flap"])
def test_too_few_tokens_dead_channels_and_bfloat16(method, ratio):
    for dtype in ("float32", "bfloat16"):
        settings = pipeline.Settings(method=method, ratio=ratio, multiple_of=1)
        out = pipeline.prune(damaged(dtype), CFG, TOKENS, settings)
        logits = models.apply(out.params, jnp.asarray(TOKENS), out.cfg)
        assert bool(jnp.isfinite(logits).all())
        assert abs(1 - out.cfg.decoder_parameters / CFG.decoder_parameters - ratio) < 0.02
        assert {x.dtype for x in jax.tree.leaves(out.params)} == {jnp.dtype(dtype)}


def test_dead_channels_go_first():
    tokens = np.random.default_rng(0).integers(0, 64, (8, 16), dtype=np.int32)
    out = pipeline.prune(damaged("float32"), CFG, tokens, pipeline.Settings(ratio=0.3, units=("mlp",), multiple_of=1))
    assert all(not set(range(5, 9)) & set(keep["f"].tolist()) for keep in out.plan.keep)


def test_a_floor_of_the_method_gives_way_and_one_of_the_user_does_not():
    gentle, harsh = (pipeline.Settings(ratio=ratio).constraints(CFG).min_kept for ratio in (0.2, 0.8))
    assert gentle == methods.find(methods.DEFAULT).min_kept > harsh == 0
    with pytest.raises(ValueError, match="lower --ratio"):
        pipeline.prune(damaged("float32"), CFG, TOKENS, pipeline.Settings(ratio=0.8, min_kept=0.5))


@pytest.mark.parametrize("ranking", [name for name in methods.RANKINGS if name != "lagrangian"])
def test_any_scorer_with_any_allocation_and_any_reconstruction(ranking):
    settings = pipeline.Settings(method="fisher", ratio=0.4, ranking=ranking, reconstruct="dense", multiple_of=1)
    out = pipeline.prune(damaged("float32"), CFG, np.arange(64, dtype=np.int32).reshape(4, 16), settings)
    assert abs(1 - out.cfg.decoder_parameters / CFG.decoder_parameters - 0.4) < 0.02
    assert [update["arrays"] for update in out.updates] == [["o", "down"]]


def test_every_step_keeps_the_floor_of_the_dense_model():
    params = damaged("float32")
    run = params["run_0"]
    params["run_0"] = run | {n: run[n].at[0].multiply(0.1) for n in ("gate", "up", "down")}  # all that goes, goes from layer 0
    settings = pipeline.Settings(method="magnitude", ratio=0.2, ranking="global", units=("mlp",), steps=4, min_kept=0.5)
    assert [dims.ff for dims in pipeline.prune(params, CFG, None, settings).cfg.layers] == [24, 40]
