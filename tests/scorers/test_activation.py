"""Scores from activations against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import allocate, models, plan, scorers, surgery

CFG = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 2, tie_embeddings=True)
PARAMS = jax.tree.map(lambda x: 3 * x, models.init(jax.random.key(0), CFG))
TOKENS = jax.random.randint(jax.random.key(1), (6, 12), 0, CFG.vocab)
observe = functools.partial(models.observe, cfg=CFG)


@functools.cache
def sites():
    return models.observe(PARAMS, TOKENS, lambda layer: {a: tuple(s) for a, s in layer.items()}, CFG)


def site(layer, axis):
    return models.Site(*(np.asarray(x, np.float64) for x in sites()[layer][axis]))


def run(scorer, batches=(TOKENS,)):
    return scorers.score(scorer, PARAMS, models.probes(CFG), batches)


def rows(layer, axis):
    """[tokens, inputs] and [inputs, d] of an output projection."""
    s = site(layer, axis)
    return s.z.reshape(-1, int(np.prod(s.z.shape[2:]))), s.w.reshape(-1, CFG.d)


def test_sites_add_up_to_the_model():
    for layer in range(2):
        for axis in "kf":
            x, w = rows(layer, axis)
            s = site(layer, axis)
            np.testing.assert_allclose(s.after, s.before + (x @ w).reshape(s.before.shape), atol=1e-4)
    last = models.rms_norm(jnp.float32(site(1, "f").after), PARAMS["norm"], CFG.norm_eps)
    np.testing.assert_allclose(last, models.hidden(PARAMS, TOKENS, CFG), atol=1e-4)


def test_wanda():
    x, w = rows(1, "k")
    per_input = np.abs(w).mean(1) * np.sqrt((x**2).mean(0))
    np.testing.assert_allclose(run(scorers.wanda(observe))[1]["k"], per_input.reshape(2, -1).sum(1), rtol=1e-4)


@pytest.mark.parametrize("variant", ["wifv", "ifv", "wifn"])
def test_fluctuation(variant):
    scores = run(scorers.fluctuation(observe, variant), [TOKENS[:1], TOKENS[1:]])
    for axis in "kf":
        x, w = rows(0, axis)
        s = {
            "wifv": x.var(0, ddof=1) * (w**2).sum(1),
            "ifv": x.var(0, ddof=1),
            "wifn": np.abs(w).mean(1) * np.sqrt((x**2).mean(0)),
        }[variant]
        s = s**2 if axis == "k" else s
        s = (s - s.mean()) / s.std()
        np.testing.assert_allclose(scores[0][axis], s.reshape(len(scores[0][axis]), -1).mean(1), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("norm", ["sum", "square"])
def test_llm_bip_is_the_change_of_the_sublayer(norm):
    scores = run(scorers.llm_bip(observe, norm))
    for axis, unit in (("k", 1), ("f", 7)):
        s = site(0, axis)
        z = s.z[:, :, unit].reshape(-1, int(np.prod(s.z.shape[3:])))
        change = np.linalg.norm(z @ s.w[unit].reshape(-1, CFG.d), axis=1)
        want = change.sum() if norm == "sum" else np.sqrt((change**2).sum())
        np.testing.assert_allclose(scores[0][axis][unit], want, rtol=1e-4)


def test_llm_bip_ranks_channels_like_the_exact_change_of_the_block():
    gates = models.probes(CFG)["gates"]
    scores = np.asarray(run(scorers.llm_bip(observe, "square"))[0]["f"])
    whole = site(0, "f").after

    def changed(unit):
        off = {"gates": ({"k": gates[0]["k"], "f": gates[0]["f"].at[unit].set(0)},) + gates[1:]}
        seen = models.hidden(PARAMS, TOKENS, CFG, off)
        return float(jnp.linalg.norm(seen - models.hidden(PARAMS, TOKENS, CFG)))

    assert whole.shape == (6, 12, 32)
    exact = np.array([changed(u) for u in range(0, 48, 4)])
    order, want = (np.argsort(np.argsort(x)) for x in (scores[::4], exact))
    assert np.corrcoef(order, want)[0, 1] > 0.9


def test_llm_bip_bounds_the_change_of_the_block():
    """Removing a KV group changes the block's output by at most 1 + L times what it changes the attention's."""
    scores = run(scorers.llm_bip(observe, "square"))[0]["k"]
    p = {n: x[0] for n, x in PARAMS["run_0"].items()}
    s = site(0, "k")

    def rest(x):
        return models.project(p, "down", x, models.mlp(p, x, CFG, {}), CFG, {})

    for unit in range(2):
        z = s.z[:, :, unit].reshape(6, 12, -1)
        before, after = s.after, s.after - z @ s.w[unit].reshape(-1, CFG.d)
        change = np.linalg.norm(rest(jnp.float32(before)) - rest(jnp.float32(after)))
        moves = jnp.float32(before), jnp.float32(after - before)
        steps = [jax.jvp(rest, (moves[0] + f * moves[1],), (moves[1],))[1] for f in np.linspace(0, 1, 21)]
        gain = max(float(jnp.linalg.norm(x)) for x in steps) / float(jnp.linalg.norm(moves[1]))
        assert change <= gain * scores[unit] * 1.01


def test_block_influence():
    s = site(0, "k"), site(0, "f")
    a, b = s[0].before.reshape(-1, 32), s[1].after.reshape(-1, 32)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(run(scorers.block_influence(observe))[0]["l"], [1 - cosine.mean()], rtol=1e-3)
    whole = run(scorers.block_influence(observe, sublayers=True))[0]
    assert whole["k"].shape == (2,)
    assert float(np.ptp(whole["f"])) == 0


def test_a_layer_that_does_nothing_has_no_influence():
    idle = PARAMS["run_0"] | {n: PARAMS["run_0"][n].at[1].set(0) for n in ("o", "down")}
    scores = scorers.score(scorers.block_influence(observe), PARAMS | {"run_0": idle}, models.probes(CFG), [TOKENS])
    assert abs(float(scores[1]["l"][0])) < 1e-5 < float(scores[0]["l"][0])
    widths = allocate.whole_layers(scores, CFG, CFG.decoder_parameters // 2, allocate.Constraints())
    assert widths == ({"k": 2, "f": 48}, {"k": 0, "f": 0})


def test_numerical_is_one_newton_step_and_newton_stays_there():
    x, w = rows(1, "f")
    a = (w @ w.T) * (x.T @ x)
    a = a + 1e-2 * np.mean(np.diag(a)) * np.eye(48)
    rho, penalty = 0.3, 1e6 * np.mean(np.diag(a))
    z = np.random.default_rng(0).random(48)
    for _ in range(2):
        gradient = a @ (z - 1) + penalty * (z.sum() - (1 - rho) * 48)
        z = z - np.linalg.solve(a + penalty, gradient)
    scores = np.asarray(run(scorers.numerical(observe))[1]["f"], np.float64)
    np.testing.assert_allclose(1 + rho * scores, z, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(scores.mean(), -1, rtol=1e-4)


def test_numerical_survives_fewer_tokens_than_channels_and_dead_channels():
    dead = PARAMS["run_0"] | {"up": PARAMS["run_0"]["up"].at[0, :, 5].set(0)}
    scores = scorers.score(scorers.numerical(observe), PARAMS | {"run_0": dead}, models.probes(CFG), [TOKENS[:1, :4]])
    assert all(bool(jnp.isfinite(x).all()) for layer in scores for x in layer.values())
    assert int(jnp.argmin(scores[0]["f"])) == 5


def test_scores_of_a_model_without_some_sublayers():
    keep = plan.Plan(({"k": []}, {"f": []}), models.unit_counts(CFG))
    small, cfg = surgery.cut(PARAMS, CFG, keep)
    partial = functools.partial(models.observe, cfg=cfg)
    for make in (scorers.wanda, scorers.fluctuation, scorers.llm_bip, scorers.numerical):
        scores = scorers.score(make(partial), small, models.probes(cfg), [TOKENS])
        assert [sorted(layer) for layer in scores] == [["f"], ["k"]]


def test_unknown_variants():
    with pytest.raises(ValueError, match="variant: 'x' given; allowed are wifv"):
        scorers.fluctuation(observe, "x")
    with pytest.raises(ValueError, match="norm: 'x' given; allowed are sum"):
        scorers.llm_bip(observe, "x")
