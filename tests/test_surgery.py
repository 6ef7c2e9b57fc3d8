"""Surgery and its proof: shapes, biases, gone sublayers, the residual width, updates that were and were not declared."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import models, pipeline, proof, scorers, surgery
from jaxprune.models import LayerDims, LlamaConfig
from jaxprune.plan import Plan, select

LAYERS = (LayerDims(2, 2, 48),) * 2 + (LayerDims(1, 3, 40),)
KINDS = {
    "gqa": dict(),
    "tied": dict(tie_embeddings=True),
    "biases": dict(biases=("q", "k", "v", "o", "gate", "up", "down")),
    "window": dict(family="mistral", sliding_window=4),
}
TOKENS = jax.random.randint(jax.random.key(1), (2, 10), 0, 64)


def model(kind):
    cfg = LlamaConfig(vocab=64, d=32, head_dim=8, layers=LAYERS, **KINDS[kind])
    params = models.init(jax.random.key(0), cfg)
    return jax.tree.map(lambda x: x * 3 + 0.1 * (x == 0), params), cfg  # biases that are not zero


PLANS = {
    "widths": ({"k": [1], "f": range(3, 40)}, {"k": [0, 1], "f": [0]}, {"f": range(0, 40, 2)}),
    "no attention": ({"k": []}, {}, {"k": [0]}),
    "no mlp": ({"f": []}, {"f": range(10)}, {}),
    "no first layer": ({"k": [], "f": []}, {}, {}),
    "residual width": ({"d": range(1, 30)},) * 3,
    "rotary pairs": ({"h": [0, 2, 3]}, {"h": [1], "k": [1], "f": range(20)}, {"h": range(4)}),
    "no rotary pairs": ({"h": [], "k": [0]}, {"h": [1, 2], "k": []}, {"h": [2]}),
    "everything": ({"k": [0], "f": [], "d": range(20)}, {"k": [], "f": [], "d": range(20)}, {"f": [7, 9], "d": range(20)}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PLANS)
def test_cutting_equals_gating_for_every_axis(kind, name):
    params, cfg = model(kind)
    plan = Plan(PLANS[name], models.unit_counts(cfg, "kf" + "".join(a for a in "hd" if a in PLANS[name][0])))
    if kind == "biases" and "d" in PLANS[name][0]:
        return  # a bias on the residual stream is cut with it; its gated twin would have to be gated too
    small, small_cfg = surgery.cut(params, cfg, plan)
    chex.assert_trees_all_equal_shapes(small, models.shapes(small_cfg))
    report = proof.verify(params, cfg, small, small_cfg, plan, TOKENS)
    assert report.exact and not report.updated and report.difference < 1e-5 * report.largest_logit


def test_scattering_and_cutting_again_returns_the_same_bits():
    params, cfg = model("biases")
    plan = Plan(PLANS["widths"], models.unit_counts(cfg))
    small, _ = surgery.cut(params, cfg, plan)
    wide = surgery.widen(small, cfg, plan)
    chex.assert_trees_all_equal_shapes(wide, params)
    chex.assert_trees_all_equal(surgery.cut(wide, cfg, plan)[0], small)


def test_grouped_query_heads_go_with_their_own_group():
    params, cfg = model("gqa")
    small, _ = surgery.cut(params, cfg, Plan(({"k": [1]}, {}, {}), models.unit_counts(cfg)))
    chex.assert_trees_all_equal(small["run_0"]["q"][0], params["run_0"]["q"][0][:, 1:])
    chex.assert_trees_all_equal(small["run_0"]["o"][0], params["run_0"]["o"][0][1:])


def test_a_change_after_the_cut_is_found_and_must_be_declared():
    params, cfg = model("gqa")
    plan = Plan(PLANS["widths"], models.unit_counts(cfg))
    small, small_cfg = surgery.cut(params, cfg, plan)
    changed = small | {"run_1": small["run_1"] | {"down": small["run_1"]["down"] + 0.25}}
    silent = proof.verify(params, cfg, changed, small_cfg, plan, TOKENS)
    assert silent.undeclared == ("layers.1.down",) and not silent.exact
    assert silent.updated["layers.1.down"] == pytest.approx(0.25, rel=1e-5)
    declared = proof.verify(params, cfg, changed, small_cfg, plan, TOKENS, updates=("down",))
    assert declared.exact and declared.difference < 1e-5 * declared.largest_logit


def test_the_proof_multiplies_at_the_highest_precision_whatever_the_default_is():
    params, cfg = model("gqa")
    with jax.default_matmul_precision("default"):  # what a GPU rounds to TF32, by more than the tolerance
        text = proof._logits.lower(params, TOKENS, cfg).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("HIGHEST" in line for line in products)


def test_one_bit_is_a_difference():
    params, cfg = model("gqa")
    plan = Plan(({}, {}, {}), models.unit_counts(cfg))
    small, small_cfg = surgery.cut(params, cfg, plan)
    changed = small | {"embed": jnp.asarray(np.nextafter(np.asarray(small["embed"]), np.float32(np.inf)))}
    assert proof.verify(params, cfg, changed, small_cfg, plan, TOKENS).undeclared == ("embed",)


def test_a_wrong_cut_is_not_exact():
    params, cfg = model("gqa")
    right, wrong = (Plan(({"k": [k]}, {}, {}), models.unit_counts(cfg)) for k in (0, 1))
    small, small_cfg = surgery.cut(params, cfg, wrong)
    report = proof.verify(params, cfg, small, small_cfg, right, TOKENS)
    assert {"layers.0.q", "layers.0.o"} <= set(report.undeclared)


def test_widths_that_the_plan_does_not_ask_for_are_named():
    params, cfg = model("gqa")
    plan = Plan(PLANS["widths"], models.unit_counts(cfg))
    with pytest.raises(ValueError, match=r"layer 0 is \(2, 2, 48\), the plan asks for \(1, 2, 37\)"):
        proof.verify(params, cfg, params, cfg, plan, TOKENS)


def test_nothing_left_is_refused():
    params, cfg = model("gqa")
    with pytest.raises(ValueError, match="it removes every layer"):
        surgery.cut(params, cfg, Plan(({"k": [], "f": []},) * 3, models.unit_counts(cfg)))
    with pytest.raises(ValueError, match="removes the whole residual stream"):
        surgery.cut(params, cfg, Plan(({"d": []},) * 3, models.unit_counts(cfg, "kfd")))
    with pytest.raises(ValueError, match="made for another model"):
        surgery.cut(params, dataclasses.replace(cfg, layers=LAYERS[::-1]), Plan(({}, {}, {}), models.unit_counts(cfg)))


@pytest.mark.parametrize("method", ["taylor", "magnitude", "random"])
@pytest.mark.parametrize(
    ("units", "more"),
    [
        (("kv", "mlp"), dict(ranking="global", steps=2)),
        (("kv", "mlp"), dict(max_distinct=1)),
        (("mlp",), dict(protect_first=1)),
        (("layers",), {}),
        (("hidden",), dict(multiple_of=2)),
    ],
)
def test_every_unit_goes_through_the_pipeline(method, units, more):
    params, cfg = model("tied")
    settings = pipeline.Settings(method=method, ratio=0.3, units=units, **dict(multiple_of=4) | more)
    tokens = None if method != "taylor" else np.asarray(TOKENS)
    out = pipeline.prune(params, cfg, tokens, settings)
    assert proof.verify(params, cfg, out.params, out.cfg, out.plan, TOKENS).exact
    reached = 1 - out.cfg.decoder_parameters / cfg.decoder_parameters
    assert abs(reached - 0.3) <= 0.005 or f"{reached:.4f} reached" in out.notes[0]
    if more.get("max_distinct") == 1:
        assert len({dims.ff for dims in out.cfg.layers}) == 1


def test_the_same_seed_gives_the_same_plan_and_another_another():
    params, cfg = model("gqa")
    plans = [pipeline.prune(params, cfg, None, pipeline.Settings(method="random", seed=s)).plan for s in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(ratio=0.0), "ratio: 0.0 given; allowed is between 0 and 1"),
        (dict(ratio=1.0), "ratio: 1.0 given"),
        (dict(method="magic"), "method: 'magic' given; allowed are kfac-obs"),
        (dict(ranking="best"), "ranking: 'best' given; allowed are local, global"),
        (dict(units=("heads",)), "units: 'heads' given; allowed are kv, mlp, inner, layers, sublayers, hidden"),
        (dict(units=("kv", "layers")), "only kv and mlp go together"),
        (dict(units=("hidden",), method="fisher"), "fisher cannot score hidden; it scores kv, mlp, layers"),
        (dict(steps=0), "steps: 0 given"),
        (dict(protect_first=-1), "protect: -1 first"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        pipeline.Settings(**options)


def test_scores_of_the_pipeline_are_those_of_the_scorer():
    params, cfg = model("gqa")
    out = pipeline.prune(params, cfg, np.asarray(TOKENS), pipeline.Settings(method="taylor", ratio=0.3))
    want = scorers.score(scorers.taylor(models.loss_fn(cfg)), params, models.probes(cfg), [TOKENS])
    chex.assert_trees_all_close(out.scores, want, rtol=1e-5)
    widths = tuple({a: len(x) for a, x in layer.items()} for layer in out.plan.keep)
    assert out.plan == select(want, widths)
