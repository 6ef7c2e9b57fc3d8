"""Scores against their definitions, on LLaMA and on a model that is none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import models, scorers
from jaxprune.models import LayerDims, LlamaConfig

CFG = LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 3, 48), LayerDims(1, 2, 40)))
PARAMS = jax.tree.map(lambda x: 3 * x, models.init(jax.random.key(0), CFG))
TOKENS = jax.random.randint(jax.random.key(1), (4, 10), 0, CFG.vocab)
LOSS = models.loss_fn(CFG, chunk=16)
PROBES = models.probes(CFG)
VARIANTS = ("param_first", "param_second", "param_mix", "vectorize")


@pytest.fixture(scope="module")
def gradients():
    """Each sequence's own weight gradient, stacked."""
    grad = jax.jit(jax.grad(lambda p, t: LOSS(p, {}, t[None])[0]))
    return jax.tree.map(lambda *x: np.stack(x), *[grad(PARAMS, t) for t in TOKENS])


def by_hand(gradients, variant, how):
    """LLM-Pruner's definition, written out with loops over layers and tensors."""
    out = []
    for run in CFG.runs:
        w = {n: np.asarray(x[0], np.float64) for n, x in PARAMS[run.name].items()}
        g = {n: x[:, 0].astype(np.float64) for n, x in gradients[run.name].items()}

        def salience(name, w=w, g=g):
            first, second = w[name] * g[name].mean(0), w[name] ** 2 * (g[name] ** 2).mean(0)
            return dict(
                param_first=np.abs(first), param_second=second, param_mix=np.abs(first - second / 2), vectorize=first
            )[variant]  # fmt: skip

        finish = np.abs if variant == "vectorize" else np.asarray
        reduce = dict(sum=np.sum, mean=np.mean, max=np.max, prod=np.prod)[how]
        q = finish(salience("q").sum(0)).sum(1)  # k g h -> k h: the query heads of a group belong to its key/value head
        o = finish(salience("o").sum(3)).sum(1)
        k, v = finish(salience("k").sum(0)), finish(salience("v").sum(0))
        mlp = [finish(salience(n).sum(axis)) for n, axis in (("gate", 0), ("up", 0), ("down", 1))]
        out.append({"k": reduce(np.stack([q, k, v, o]), axis=0).sum(1), "f": reduce(np.stack(mlp), axis=0)})
    return out


@pytest.mark.parametrize("how", ["sum", "mean", "max", "prod"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_taylor_is_llm_pruners_formula(gradients, variant, how):
    got = scorers.score(scorers.taylor(LOSS, variant, how), PARAMS, PROBES, [TOKENS])
    for mine, want in zip(got, by_hand(gradients, variant, how), strict=True):
        for axis in "kf":
            np.testing.assert_allclose(mine[axis], want[axis], rtol=2e-4, atol=1e-5 * want[axis].max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_taps_equal_full_gradients(variant):
    taps = scorers.score(scorers.taylor(LOSS, variant), PARAMS, PROBES, [TOKENS])
    full = scorers.full_taylor(LOSS, lambda tree: models.sum_over_units(tree, CFG), variant)
    for a, b in zip(taps, scorers.score(full, PARAMS, PROBES, [TOKENS]), strict=True):
        for axis in "kf":
            np.testing.assert_allclose(a[axis], b[axis], rtol=1e-5, atol=1e-6 * float(b[axis].max()))


def test_gate_gradients_are_sums_over_outgoing_weights(gradients):
    score = scorers.score(scorers.gate_taylor(LOSS), PARAMS, PROBES, [TOKENS])
    for i, run in enumerate(CFG.runs):
        wg = {n: np.asarray(PARAMS[run.name][n][0]) * gradients[run.name][n][:, 0] for n in ("o", "down")}
        np.testing.assert_allclose(score[i]["k"], np.abs(wg["o"].sum((2, 3, 4)).mean(0)), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(score[i]["f"], np.abs(wg["down"].sum(2).mean(0)), rtol=1e-3, atol=1e-6)


def test_fisher_squares_each_sequence_on_its_own(gradients):
    score = scorers.score(scorers.fisher(LOSS), PARAMS, PROBES, [TOKENS])
    for i, run in enumerate(CFG.runs):
        per_sequence = (np.asarray(PARAMS[run.name]["down"][0]) * gradients[run.name]["down"][:, 0]).sum(2)
        np.testing.assert_allclose(score[i]["f"], (per_sequence**2).mean(0), rtol=1e-3, atol=1e-9)


def test_the_gate_score_predicts_a_small_change_of_the_loss():
    """dL/dm against the true change for a gate moved by a little: the definition of a derivative."""
    gates = jax.tree.map(jnp.asarray, PROBES["gates"])
    mean = jax.jit(lambda g: LOSS(PARAMS, {"gates": g}, TOKENS).mean())
    score = scorers.score(scorers.gate_taylor(LOSS), PARAMS, PROBES, [TOKENS])
    moved = ({**gates[0], "k": gates[0]["k"].at[1].add(-0.05)}, gates[1])
    back = ({**gates[0], "k": gates[0]["k"].at[1].add(0.05)}, gates[1])
    assert abs(mean(moved) - mean(back)) / 0.1 == pytest.approx(float(score[0]["k"][1]), rel=0.02)


def test_magnitude_is_the_sum_of_powers():
    got = scorers.score(scorers.magnitude(lambda t: models.sum_over_units(t, CFG), 2, "sum"), PARAMS, PROBES)
    w = {n: np.asarray(x[0], np.float64) ** 2 for n, x in PARAMS["run_0"].items()}
    np.testing.assert_allclose(got[0]["f"], w["gate"].sum(0) + w["up"].sum(0) + w["down"].sum(1), rtol=1e-5)
    want = w["q"].sum((0, 2, 3)) + w["k"].sum((0, 2)) + w["v"].sum((0, 2)) + w["o"].sum((1, 2, 3))
    np.testing.assert_allclose(got[0]["k"], want, rtol=1e-5)


def perceptron_loss(params, probes, batch):
    """Not a LLaMA: two layers of tanh, regression, gates on the hidden units."""
    x, y = batch
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    if "gates" in probes:
        hidden = hidden * probes["gates"][0]["f"]
    return jnp.square(hidden @ params["w2"] - y).sum(-1)


@pytest.mark.parametrize("name", ["full_taylor", "gate_taylor", "fisher", "magnitude", "mix"])
def test_any_loss_over_any_pytree(name):
    keys = jax.random.split(jax.random.key(0), 4)
    params = dict(w1=jax.random.normal(keys[0], (5, 7)), b1=jnp.zeros(7), w2=jax.random.normal(keys[1], (7, 3)).at[4].set(0))
    batch = jax.random.normal(keys[2], (6, 5)), jax.random.normal(keys[3], (6, 3))

    def units(tree):
        return ({"f": {"w2": tree["w2"].sum(1)}},)

    probes = {"gates": ({"f": jnp.ones(7)},)}
    scorer = dict(
        full_taylor=scorers.full_taylor(perceptron_loss, units),
        gate_taylor=scorers.gate_taylor(perceptron_loss),
        fisher=scorers.fisher(perceptron_loss),
        magnitude=scorers.magnitude(units),
        mix=scorers.mix((1.0, scorers.magnitude(units)), (2.0, scorers.fisher(perceptron_loss))),
    )[name]
    score = scorers.score(scorer, params, probes, [batch])[0]["f"]
    assert score.shape == (7,) and int(jnp.argmin(score)) == 4 and score[4] == 0 and (jnp.delete(score, 4) > 0).all()


def test_transforms_and_combinations():
    layer = ({"f": jnp.array([1.0, 2, 3]), "k": jnp.array([5.0, 7])},)
    assert scorers.standardize()(layer)[0]["f"].mean() == pytest.approx(0, abs=1e-6)
    assert scorers.normalize()(layer)[0]["k"].mean() == pytest.approx(1)
    assert scorers.scale({"k": 3.0})(layer)[0]["k"].tolist() == [15, 21]
    a, b = scorers.gate_taylor(LOSS), scorers.fisher(LOSS)
    alone = [scorers.score(s, PARAMS, PROBES, [TOKENS]) for s in (a, b)]
    mixed = scorers.score(scorers.mix((2.0, a), (3.0, b)), PARAMS, PROBES, [TOKENS])
    np.testing.assert_allclose(mixed[1]["f"], 2 * alone[0][1]["f"] + 3 * alone[1][1]["f"], rtol=1e-5)
    split = scorers.score(scorers.per_axis(k=a, f=b), PARAMS, PROBES, [TOKENS])
    np.testing.assert_array_equal(split[0]["k"], alone[0][0]["k"])
    np.testing.assert_array_equal(split[0]["f"], alone[1][0]["f"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scorers.taylor(LOSS, "third"), "variant: 'third' given; allowed are param_first"),
        (lambda: scorers.taylor(LOSS, aggregate="min"), "aggregate: 'min' given; allowed are sum, mean, max, prod"),
        (lambda: scorers.magnitude(lambda t: t, 3), "p: 3 given; allowed are 1 and 2"),
        (lambda: scorers.mix(), "mix: no scorers given"),
        (lambda: scorers.per_axis(), "per_axis: no scorers given"),
        (lambda: scorers.score(scorers.fisher(LOSS), PARAMS, PROBES, []), "needs at least one calibration batch"),
        (lambda: scorers.score(scorers.taylor(LOSS), PARAMS, PROBES), "needs at least one calibration batch"),
        (lambda: models.hidden(PARAMS, TOKENS, CFG, microbatch=3), "microbatch: 3 given; it must divide the batch of 4"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
