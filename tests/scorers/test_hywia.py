"""The fusion of fine and coarse importance against its equations, and its ends against the scores that it fuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import models, scorers

CFG = models.LlamaConfig(vocab=32, d=16, head_dim=4, layers=(models.LayerDims(3, 2, 20),) * 2)
PARAMS = jax.tree.map(lambda x: 10 * x, models.init(jax.random.key(0), CFG))
TOKENS = jax.random.randint(jax.random.key(1), (4, 7), 0, CFG.vocab)
LOSS = models.loss_fn(CFG)
PROBES = models.probes(CFG)


@pytest.fixture(scope="module")
def parts():
    """The coarse and the fine score, each divided by its mean, layer by layer and axis by axis."""
    both = [scorers.chain(scorers.taylor(LOSS, v), scorers.normalize()) for v in ("vectorize", "param_mix")]
    return [scorers.score(s, PARAMS, PROBES, [TOKENS]) for s in both]


@pytest.fixture(scope="module")
def state():
    """What calibration leaves behind; the fusion comes after it."""
    scorer = scorers.hywia(LOSS)
    return jax.jit(scorer.update)(scorer.init(PROBES), PARAMS, PROBES, TOKENS)


@pytest.mark.parametrize(("alpha", "part"), [(1.0, 0), (0.0, 1)])
def test_the_ends_of_the_fixed_fusion_are_the_two_scores(parts, state, alpha, part):
    for mine, alone in zip(scorers.hywia(LOSS, "fixed", alpha).finalize(state), parts[part], strict=True):
        for axis in "kf":
            np.testing.assert_allclose(mine[axis], alone[axis], rtol=1e-4)
            np.testing.assert_array_equal(np.argsort(mine[axis]), np.argsort(alone[axis]))


def weight_by_hand(fusion, c, f, temperature):
    if fusion == "uncertainty":
        return f.var() / (c.var() + f.var())
    x = np.stack([c, f], 1)  # units, granularities
    similar = np.exp(x.T @ x / (len(c) * temperature))
    return (similar / similar.sum(1, keepdims=True)).mean(0)[0]


@pytest.mark.parametrize(("fusion", "temperature"), [("attention", 1.0), ("attention", 0.2), ("uncertainty", 1.0)])
def test_the_weights_are_those_of_the_equations(parts, state, fusion, temperature):
    got = scorers.hywia(LOSS, fusion, temperature=temperature).finalize(state)
    coarse, fine = (jax.tree.map(lambda x: np.asarray(x, np.float64), x) for x in parts)
    for layer, axis in ((0, "k"), (0, "f"), (1, "k"), (1, "f")):
        c, f = coarse[layer][axis], fine[layer][axis]
        a = weight_by_hand(fusion, c, f, temperature)
        assert 0.01 < a < 0.99 and abs(a - 0.5) > 1e-4
        np.testing.assert_allclose(got[layer][axis], a * c + (1 - a) * f, rtol=1e-4)


def test_a_high_temperature_weighs_both_the_same(state):
    fixed, hot = (s.finalize(state) for s in (scorers.hywia(LOSS, "fixed", 0.5), scorers.hywia(LOSS, temperature=1e9)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), hot, fixed)


@pytest.mark.parametrize("fusion", ["attention", "fixed", "uncertainty"])
def test_scores_of_zero_stay_finite(state, fusion):
    scores = scorers.hywia(LOSS, fusion).finalize(state._replace(total=jax.tree.map(jnp.zeros_like, state.total)))
    assert all((x == 0).all() for x in jax.tree.leaves(scores))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(fusion="learned"), "fusion: 'learned' given; allowed are attention, fixed, uncertainty"),
        (dict(alpha=1.5), "alpha: 1.5 given; allowed are numbers from 0"),
        (dict(temperature=0.0), "temperature: 0.0 given; it must be positive"),
        (dict(aggregate="min"), "aggregate: 'min' given; allowed are sum, mean, max, prod"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        scorers.hywia(LOSS, **options)
