"""Layer-sequential scores against their definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import allocate, models, pipeline, plan, scorers, sequential, surgery

LAYERS = (models.LayerDims(3, 2, 48),) * 2 + (models.LayerDims(2, 1, 40),)
CFG = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=LAYERS, biases=("q", "o", "down"))
PARAMS = jax.tree.map(lambda x: 3 * x + 0.05, models.init(jax.random.key(0), CFG))
TOKENS = np.asarray(jax.random.randint(jax.random.key(1), (6, 9), 0, CFG.vocab))
WIDTHS = ({"k": 1, "f": 16}, {"k": 2, "f": 24}, {"k": 1, "f": 8})
SCORERS = dict(wanda=scorers.wanda, numerical=scorers.numerical, llm_bip=scorers.llm_bip)


def make(name):
    return lambda cfg: SCORERS[name](functools.partial(models.observe, cfg=cfg))


@pytest.mark.parametrize("name", SCORERS)
def test_a_layer_is_scored_on_what_the_pruned_layers_before_it_pass_on(name):
    found = sequential.score(make(name), PARAMS, CFG, [TOKENS[:3], TOKENS[3:]], WIDTHS)
    params, cfg = PARAMS, CFG
    for layer in range(3):
        dense = scorers.score(make(name)(cfg), params, models.probes(cfg), [TOKENS])[layer]
        for axis, want in dense.items():
            np.testing.assert_allclose(found[layer][axis], want, rtol=1e-3, atol=1e-5 * float(jnp.abs(want).max()))
        keep = plan.select(found, WIDTHS).keep
        only = plan.Plan(tuple(keep[i] if i <= layer else {} for i in range(3)), models.unit_counts(CFG))
        params, cfg = surgery.cut(PARAMS, CFG, only)


def test_a_sublayer_that_is_gone_passes_the_stream_on():
    gone = plan.Plan(({"k": []}, {"k": [], "f": []}, {}), models.unit_counts(CFG))
    params, cfg = surgery.cut(PARAMS, CFG, gone)
    widths = ({"f": 48}, {}, {"k": 2, "f": 40})
    found = sequential.score(make("wanda"), params, cfg, [TOKENS], widths)
    dense = scorers.score(make("wanda")(cfg), params, models.probes(cfg), [TOKENS])
    assert [set(layer) for layer in found] == [{"f"}, set(), {"k", "f"}]
    np.testing.assert_allclose(found[2]["f"], dense[2]["f"], rtol=1e-4)


def test_wanda_sp_prunes_by_it_where_widths_are_known_before_scores():
    settings = pipeline.Settings(method="wanda-sp", ratio=0.4)
    budget, constraints = round(0.4 * CFG.decoder_parameters), settings.constraints(CFG)
    widths = allocate.local((), CFG, budget, constraints)
    found = sequential.score(make("wanda"), PARAMS, CFG, [TOKENS], widths)
    out = pipeline.prune(PARAMS, CFG, TOKENS, settings)
    assert out.plan.digest == plan.select(found, widths).digest
    by_global = pipeline.prune(PARAMS, CFG, TOKENS, pipeline.Settings(method="wanda-sp", ratio=0.4, ranking="global"))
    dense = scorers.score(make("wanda")(CFG), PARAMS, models.probes(CFG), [TOKENS])
    assert by_global.plan.digest == plan.select(dense, allocate.global_(dense, CFG, budget, constraints)).digest


def test_bad_input():
    with pytest.raises(ValueError, match="batches: none given"):
        sequential.score(make("wanda"), PARAMS, CFG, [], WIDTHS)
    with pytest.raises(ValueError, match="give one of activations"):
        sequential.score(lambda cfg: scorers.fisher(models.loss_fn(cfg)), PARAMS, CFG, [TOKENS], WIDTHS)
