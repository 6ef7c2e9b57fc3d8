"""Closed-form reconstruction against its definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import models, proof, recovery, surgery
from jaxprune.plan import Plan

CFG = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 3, tie_embeddings=True)
PARAMS = jax.tree.map(lambda x: 3 * x, models.init(jax.random.key(0), CFG))
TOKENS = jax.random.randint(jax.random.key(1), (16, 24), 0, CFG.vocab)
KEEP = ({}, {"k": [1], "f": range(0, 48, 2)}, {"f": range(30)})
PLAN = Plan(tuple({a: list(x) for a, x in k.items()} for k in KEEP), models.unit_counts(CFG))


def problem(n=24, out=10, tokens=100, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, n)) @ rng.normal(size=(n, tokens))
    return rng.normal(size=(out, n)), x


def test_masked_least_squares_is_the_least_squares_of_numpy():
    w, x = problem()
    keep = np.arange(0, 24, 3)
    want = np.linalg.lstsq(x[keep].T, (w @ x).T, rcond=None)[0].T
    np.testing.assert_allclose(recovery.masked_least_squares(w, x @ x.T, keep, damp=1e-14), want, rtol=1e-6)


def test_masked_least_squares_is_the_formula_of_its_paper():
    w, x = problem()
    gram = 2 * x @ x.T
    inverse = np.linalg.inv(gram)
    gone = np.array([1, 5, 6])
    change = -inverse[:, gone] @ np.linalg.solve(inverse[np.ix_(gone, gone)], w.T[gone])
    keep = np.setdiff1d(np.arange(24), gone)
    np.testing.assert_allclose(recovery.masked_least_squares(w, x @ x.T, keep, 1e-14), (w.T + change)[keep].T, rtol=1e-6)


@pytest.mark.parametrize("tokens", [3, 100])
def test_keeping_everything_changes_nothing(tokens):
    w, x = problem(tokens=tokens)
    assert (recovery.masked_least_squares(w, x @ x.T, np.arange(24)) == w).all()
    same = recovery.least_squares_to(w @ x @ x.T, x @ x.T, w, np.arange(24))
    np.testing.assert_allclose(same, w, rtol=1e-8)


@pytest.mark.parametrize("damp", [0.0, 1e-2])
@pytest.mark.parametrize("kept", [1, 5, 23])
def test_rank_deficient_statistics_give_finite_weights(damp, kept):
    w, x = problem(tokens=4)
    x[3] = 0  # a dead input
    fit = recovery.masked_least_squares(w, (x @ x.T).astype(np.float32), np.arange(kept), damp)
    assert np.isfinite(fit).all()
    plain = np.linalg.norm(w @ x - w[:, :kept] @ x[:kept])
    assert np.linalg.norm(w @ x - fit @ x[:kept]) <= plain * (1 + 1e-6)


def test_nothing_but_zeros_keeps_the_weights():
    w, _ = problem()
    np.testing.assert_allclose(recovery.masked_least_squares(w, np.zeros((24, 24)), np.arange(5)), w[:, :5])


def test_statistics_that_are_not_finite_are_refused():
    w, x = problem()
    with pytest.raises(ValueError, match="NaN"):
        recovery.masked_least_squares(w, x @ x.T * np.nan, np.arange(5))


def test_admm_reaches_the_optimum_on_columns():
    w, x = problem()
    kept = np.arange(24) % 3 > 0
    exact = recovery.masked_least_squares(w, x @ x.T, np.flatnonzero(kept), damp=1e-14)
    got = recovery.admm(w, x @ x.T, kept, iterations=2000)
    error, best = (np.linalg.norm(w @ x - f @ x[kept]) for f in (got[:, kept], exact))
    assert (got[:, ~kept] == 0).all()
    assert error <= best * (1 + 1e-4)


def test_admm_on_rows_of_their_own():
    w, x = problem()
    kept = np.random.default_rng(1).random(w.shape) < 0.6
    got = recovery.admm(w, x @ x.T, kept, iterations=2000)
    for row, mask, fit in zip(w, kept, got, strict=True):
        best = recovery.masked_least_squares(row[None], x @ x.T, np.flatnonzero(mask), damp=1e-14)[0]
        assert np.linalg.norm(row @ x - fit @ x) <= np.linalg.norm(row @ x - best @ x[mask]) * (1 + 1e-3)


@pytest.mark.parametrize(("size", "step"), [(1, 1), (1, 7), (4, 1)])
def test_greedy_removal_costs_what_the_definition_says(size, step):
    w, x = problem()
    metric = np.diag(np.linspace(0.1, 2, 10))
    gram = x @ x.T
    h = np.linalg.inv(gram + 1e-2 * np.mean(np.diag(gram)) * np.eye(24))

    def cost(units):
        i = (np.asarray(units, int)[:, None] * size + np.arange(size)).reshape(-1)
        return np.trace(metric @ w.T[i].T @ np.linalg.solve(h[np.ix_(i, i)], w.T[i])) if len(i) else 0.0

    scores = recovery.greedy(w.T, gram, metric, size=size, step=step)
    order = np.argsort(scores, kind="stable")
    for end in range(step, len(order) + 1, step):
        gone = order[:end]
        np.testing.assert_allclose(scores[gone[-1]], cost(gone), rtol=1e-3)
        block, before = gone[end - step :], gone[: end - step]
        others = [u for u in order if u not in gone]
        if step == 1 and others:
            assert cost(gone) <= min(cost([*before, u]) for u in others) * (1 + 1e-4), block


PAIRS = ({}, {"h": [1], "k": [1], "f": range(0, 48, 2)}, {"h": [0, 2, 3]})


def _fit(target, keep=KEEP, params=PARAMS, cfg=CFG, **options):
    keep = tuple({a: np.asarray(list(x)) for a, x in k.items()} for k in keep)
    return recovery.reconstruct(params, cfg, keep, [TOKENS[:8], TOKENS[8:]], target=target, **options)


@pytest.mark.parametrize("target", recovery.TARGETS)
def test_nothing_pruned_keeps_every_bit(target):
    fitted, cfg = _fit(target, ({}, {"k": [0, 1]}, {"f": range(48)}))
    if target == "bias":
        assert cfg.biases == ("o", "down")
        fitted = fitted | {"run_0": {n: x for n, x in fitted["run_0"].items() if not n.endswith("_bias")}}
    jax.tree.map(np.testing.assert_array_equal, fitted, PARAMS)


@pytest.mark.parametrize("keep", [KEEP, PAIRS], ids=["groups", "pairs"])
@pytest.mark.parametrize("target", recovery.TARGETS)
def test_the_cut_of_a_reconstructed_model_is_exact(target, keep):
    plan = Plan(tuple({a: list(x) for a, x in k.items()} for k in keep), models.unit_counts(CFG, "kfh"))
    fitted, cfg = _fit(target, keep)
    small, small_cfg = surgery.cut(fitted, cfg, plan)
    names = ("o_bias", "down_bias") if target == "bias" else ("o", "down")
    report = proof.verify(PARAMS, CFG, small, small_cfg, plan, TOKENS[:2], names)
    assert report.exact
    assert not any(name.startswith("layers.0.") for name in report.updated)
    assert report.updated


@pytest.mark.parametrize("keep", [KEEP, PAIRS], ids=["groups", "pairs"])
@pytest.mark.parametrize("target", ["dense", "weights", "residual", "admm"])
def test_the_residual_stream_comes_nearer_to_the_dense_one(target, keep):
    plan = Plan(tuple({a: list(x) for a, x in k.items()} for k in keep), models.unit_counts(CFG, "kfh"))

    def after(params):
        cut, cfg = surgery.cut(params, CFG, plan)
        return models.observe(cut, TOKENS, lambda sites: sites["f"].after, cfg)[-1]

    dense = models.observe(PARAMS, TOKENS, lambda sites: sites["f"].after, CFG)[-1]
    distance = [float(jnp.linalg.norm(after(p) - dense)) for p in (_fit(target, keep)[0], PARAMS)]
    assert distance[0] < 0.9 * distance[1]


def test_a_residual_target_without_correction_is_that_of_the_weights():
    """And with all of it, the kept units are fitted nearest to the dense stream on the text that they are fitted on."""
    none = _fit("residual", damp=1e-2, correction=0.0)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), none, _fit("weights")[0])
    dense = models.observe(PARAMS, TOKENS, lambda sites: sites["k"].after, CFG)[1]
    keep = ({"f": range(24)}, {"k": [1]}, {})  # the attention of layer 1 is the first that reads a stream of pruned layers
    plan = Plan(tuple({a: list(x) for a, x in k.items()} for k in keep), models.unit_counts(CFG))
    distance = []
    for part in (0.0, 0.5, 1.0):
        cut, cfg = surgery.cut(_fit("residual", keep, damp=1e-4, correction=part)[0], CFG, plan)
        stream = models.observe(cut, TOKENS, lambda sites: sites["k"].after, cfg)[1]
        distance.append(float(jnp.linalg.norm(stream - dense)))
    assert distance[0] > distance[1] > distance[2]


def test_the_correction_goes_from_the_first_layer_to_the_last():
    """Of three layers the one in the middle has the mean; the last has its own, and reads what the others left."""
    same = [_fit("residual", correction=c)[0]["run_0"] for c in ((0.5, 0.5), 0.5)]
    jax.tree.map(np.testing.assert_array_equal, *same)
    falling, middle = (_fit("residual", correction=c)[0]["run_0"] for c in ((0.75, 0.25), 0.5))
    np.testing.assert_array_equal(falling["down"][1], middle["down"][1])
    assert np.abs(np.asarray(falling["down"][2] - middle["down"][2])).max() > 1e-3


def test_dense_statistics_are_those_of_the_dense_model():
    inputs = models.observe(PARAMS, TOKENS, lambda sites: sites["f"].z.reshape(-1, 48), CFG)[2]
    x = np.asarray(inputs, np.float64).T
    power = np.mean(x * x, 1)
    damp = 1e-2 * power[:30].mean() / power.mean()  # in means over the inputs that stay
    want = recovery.masked_least_squares(np.asarray(PARAMS["run_0"]["down"][2]).T, x @ x.T, np.arange(30), damp)
    got = _fit("dense")[0]["run_0"]["down"][2, :30].T
    np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())


def test_alternating_directions_come_near_the_exact_fit():
    """On what the dense model adds, and less near than the exact fit, which nothing can beat."""
    inputs = models.observe(PARAMS, TOKENS, lambda sites: sites["f"].z.reshape(-1, 48), CFG)[2]
    x, dense = np.asarray(inputs, np.float64), np.asarray(PARAMS["run_0"]["down"][2])

    def error(target, **options):
        return np.linalg.norm(x @ (np.asarray(_fit(target, **options)[0]["run_0"]["down"][2]) - dense))

    exact, plain = error("dense", damp=1e-6), np.linalg.norm(x[:, 30:] @ dense[30:])
    assert 0.9999 * exact < error("admm") < 1.02 * exact < plain


def test_the_bias_is_the_mean_of_what_goes():
    inputs = models.observe(PARAMS, TOKENS, lambda sites: sites["f"].z.mean((0, 1)), CFG)[2]
    want = np.asarray(inputs)[30:] @ np.asarray(PARAMS["run_0"]["down"][2, 30:])
    np.testing.assert_allclose(_fit("bias")[0]["run_0"]["down_bias"][2], want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("target", ["weights", "residual", "admm", "bias"])
def test_models_with_biases_and_bfloat16(target):
    cfg = dataclasses.replace(CFG, biases=("q", "o", "down"))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), models.init(jax.random.key(0), cfg))
    fitted, fitted_cfg = _fit(target, params=params, cfg=cfg)
    assert {x.dtype for x in jax.tree.leaves(fitted)} == {jnp.dtype(jnp.bfloat16)}
    assert all(bool(jnp.isfinite(x.astype(jnp.float32)).all()) for x in jax.tree.leaves(fitted))
    assert jax.tree.map(jnp.shape, fitted) == jax.tree.map(jnp.shape, models.shapes(fitted_cfg))


def test_a_sublayer_that_goes_entirely():
    fitted, cfg = _fit("residual", ({}, {"k": [], "f": range(40)}, {}))
    plan = Plan(({}, {"k": [], "f": list(range(40))}, {}), models.unit_counts(CFG))
    small, small_cfg = surgery.cut(fitted, cfg, plan)
    assert proof.verify(PARAMS, CFG, small, small_cfg, plan, TOKENS[:2], ("o", "down")).exact


def test_bad_input():
    with pytest.raises(ValueError, match="target: 'x' given; allowed are dense"):
        _fit("x")
    with pytest.raises(ValueError, match=r"correction: 1.5 given; allowed is 0 to 1"):
        _fit("residual", correction=1.5)
    with pytest.raises(ValueError, match=r"correction: \(1.0, -0.5\) given; allowed is 0 to 1"):
        _fit("residual", correction=(1.0, -0.5))
    with pytest.raises(ValueError, match="batches: none given"):
        recovery.reconstruct(PARAMS, CFG, KEEP, [])
