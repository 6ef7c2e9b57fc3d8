"""Scores from kernels against the explicit Jacobians and kernels of a tiny model."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxprune import models, scorers

CFG = models.LlamaConfig(vocab=32, d=16, head_dim=4, layers=(models.LayerDims(2, 2, 6),) * 2)
PARAMS = jax.tree.map(lambda x: 10 * x, models.init(jax.random.key(0), CFG))
TOKENS = jax.random.randint(jax.random.key(1), (3, 7), 0, CFG.vocab)
B = 3
FUNCTION = models.max_logits_fn(CFG, chunk=24)
PROBES = models.probes(CFG)


def units(tree):
    return models.sum_over_units(tree, CFG)


def per_unit(tree):
    """An element-wise statistic of the weights, summed over each unit, as one vector."""
    return ravel_pytree(scorers.aggregate(units(tree)))[0]


def flat(scores):
    return ravel_pytree(scores)[0]


@pytest.fixture(scope="module")
def jacobian():
    """Each sequence's own weight gradient: a list of trees."""
    grad = jax.jit(jax.grad(lambda p, t: FUNCTION(p, {}, t[None])[0]))
    return [grad(PARAMS, t) for t in TOKENS]


@pytest.fixture(scope="module")
def unit_of_weight():
    """For each weight of the flattened tree the number of its unit, from 1; 0 for weights of none. Two labels never meet."""
    _, unravel = ravel_pytree(PARAMS)
    n = flat(PROBES["gates"]).size
    labels = np.zeros(ravel_pytree(PARAMS)[0].size, int)
    _, pull = jax.vjp(lambda w: per_unit(unravel(w)), ravel_pytree(PARAMS)[0])
    for u in range(n):
        mine = np.asarray(pull(jnp.zeros(n).at[u].set(1))[0]) == 1
        assert not labels[mine].any()
        labels[mine] = u + 1
    return labels


def test_nirvana_is_weight_times_gradient_over_all_weights_of_a_unit(jacobian):
    got = scorers.score(scorers.nirvana(FUNCTION), PARAMS, PROBES, [TOKENS])
    want = per_unit(jax.tree.map(lambda w, *g: jnp.abs(w * sum(g) / B), PARAMS, *jacobian))
    np.testing.assert_allclose(flat(got), want, rtol=1e-4, atol=1e-6 * float(want.max()))


def test_gates_against_the_kernel_without_each_unit():
    gates, unravel = ravel_pytree(PROBES["gates"])
    j = np.asarray(jax.jit(jax.jacobian(lambda g: FUNCTION(PARAMS, {"gates": unravel(g)}, TOKENS)))(gates), np.float64)
    kernel = j @ j.T
    without = [np.delete(j, u, 1) @ np.delete(j, u, 1).T for u in range(j.shape[1])]
    want = np.array([np.linalg.norm(kernel) ** 2 - np.linalg.norm(k) ** 2 for k in without]) / B**2
    got = flat(scorers.score(scorers.ntk_gates(FUNCTION), PARAMS, PROBES, [TOKENS]))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6 * want.max())
    fall_of_trace = flat(scorers.score(scorers.fisher(FUNCTION), PARAMS, PROBES, [TOKENS]))
    np.testing.assert_allclose(fall_of_trace, [(np.trace(kernel) - np.trace(k)) / B for k in without], rtol=1e-4, atol=1e-9)
    assert (got >= fall_of_trace**2 * (1 - 1e-5)).all()


def test_sgd_against_the_kernel_without_each_unit(jacobian, unit_of_weight):
    j = np.stack([np.asarray(ravel_pytree(g)[0], np.float64) for g in jacobian])
    kernel = j @ j.T
    parts = [j[:, unit_of_weight == u] for u in range(1, unit_of_weight.max() + 1)]
    want = np.array([np.trace(kernel) - np.trace(kernel - x @ x.T) for x in parts]) / B
    got = flat(scorers.score(scorers.ntk_sgd(FUNCTION), PARAMS, PROBES, [TOKENS]))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6 * want.max())


@pytest.mark.parametrize("kind", ["energy", "energy_of_sum"])
def test_energy_taps_are_squares_of_weight_gradients(jacobian, kind):
    """Law 10."""
    grads = jax.jit(jax.grad(lambda taps: FUNCTION(PARAMS, {kind: taps}, TOKENS).sum()))(PROBES["taps"])
    square = {"energy": lambda *g: sum(x**2 for x in g), "energy_of_sum": lambda *g: sum(g) ** 2}[kind]
    want = units(jax.tree.map(square, *jacobian))
    for mine, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6 * float(theirs.max()))


def test_the_mean_over_all_signs_is_exact():
    exact = flat(scorers.score(scorers.ntk_sgd(FUNCTION), PARAMS, PROBES, [TOKENS]))
    every = jnp.array(list(itertools.product([-1.0, 1.0], repeat=B)))

    @jax.jit
    def energy(signs):
        return jax.grad(lambda taps: (signs * FUNCTION(PARAMS, {"energy_of_sum": taps}, TOKENS)).sum())(PROBES["taps"])

    mean = jax.tree.map(lambda *x: sum(x) / len(x) / B, *[energy(signs) for signs in every])
    np.testing.assert_allclose(flat(scorers.aggregate(mean)), exact, rtol=1e-3)


def test_draws_come_close(jacobian):
    """Within five standard deviations: the variance of one draw is that of twice the sum of the products of pairs."""
    draws = 400
    exact = flat(scorers.score(scorers.ntk_sgd(FUNCTION), PARAMS, PROBES, [TOKENS]))
    got = flat(scorers.score(scorers.ntk_sgd(FUNCTION, draws), PARAMS, PROBES, [TOKENS]))
    pairs = [per_unit(jax.tree.map(jnp.multiply, a, b)) for a, b in itertools.combinations(jacobian, 2)]
    deviation = 2 / B * jnp.sqrt(sum(x**2 for x in pairs) / draws)
    assert (jnp.abs(got - exact) <= 5 * deviation + 1e-4 * exact).all()
    assert not jnp.allclose(got, exact, rtol=1e-4)


def test_sign_against_the_explicit_kernel(jacobian, unit_of_weight):
    j = np.stack([np.asarray(ravel_pytree(g)[0], np.float64) for g in jacobian])
    kernel = j @ np.sign(j).T
    parts = [j[:, unit_of_weight == u] for u in range(1, unit_of_weight.max() + 1)]
    want = np.array([np.sum(kernel * (x @ np.sign(x).T)) for x in parts]) / B**2
    got = flat(scorers.score(scorers.ntk_sign(FUNCTION, units), PARAMS, PROBES, [TOKENS]))
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * want.max())
    rate = (np.sum(kernel**2) - np.sum((kernel - 1e-4 * parts[0] @ np.sign(parts[0]).T) ** 2)) / 1e-4
    assert rate == pytest.approx(2 * B**2 * float(got[0]), rel=1e-2)


def test_bad_input():
    with pytest.raises(ValueError, match="draws: 0 given; at least 1 is needed, or None"):
        scorers.ntk_sgd(FUNCTION, 0)
