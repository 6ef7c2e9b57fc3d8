"""Second order along gates against the true change of the loss and the whole Hessian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxprune import models, scorers

CFG = models.LlamaConfig(vocab=32, d=16, head_dim=4, layers=(models.LayerDims(2, 2, 6),) * 2)
PARAMS = jax.tree.map(lambda x: 10 * x, models.init(jax.random.key(0), CFG))
TOKENS = jax.random.randint(jax.random.key(1), (3, 7), 0, CFG.vocab)
LOSS = models.loss_fn(CFG)
PROBES = models.probes(CFG)
QUADRATIC = {"gates": ({"k": jnp.ones(2), "f": jnp.ones(3)}, {"f": jnp.ones(2)})}


def quadratic(params, probes, tokens):
    """A random quadratic function of the gates, another one for each sequence."""
    a, b = params
    m, _ = ravel_pytree(probes["gates"])
    return tokens * (m @ a @ m) + (tokens**2) * (b @ m) + 3


@pytest.mark.parametrize("batches", [([1.0, -2.0, 0.5],), ([1.0], [-2.0, 0.5])])
def test_it_is_the_true_change_of_a_loss_quadratic_in_the_gates(batches):
    """Law 10."""
    params = jax.random.normal(jax.random.key(0), (7, 7)), jax.random.normal(jax.random.key(1), (7,))
    batches = [jnp.array(x) for x in batches]
    scores = scorers.score(scorers.curvature(quadratic, exact="kf"), params, QUADRATIC, batches)
    ones, unravel = ravel_pytree(QUADRATIC["gates"])

    def mean(gates):
        return jnp.concatenate([quadratic(params, {"gates": unravel(gates)}, x) for x in batches]).mean()

    want = jnp.stack([mean(ones.at[u].set(0)) - mean(ones) for u in range(7)])
    np.testing.assert_allclose(ravel_pytree(scores)[0], want, rtol=1e-4, atol=1e-5)
    assert (want < 0).any() and (want > 0).any()


def test_one_draw_is_exact_where_the_hessian_is_diagonal():
    params = jnp.diag(jnp.arange(1.0, 8.0)), jnp.zeros(7)
    scores = scorers.score(scorers.curvature(quadratic, samples=1), params, QUADRATIC, [jnp.ones(2)])
    np.testing.assert_allclose(ravel_pytree(scores)[0], -jnp.arange(1.0, 8.0), rtol=1e-5)


@pytest.fixture(scope="module")
def by_hessian():
    """Gradient and Hessian of the mean loss by all gates of the model."""
    ones, unravel = ravel_pytree(PROBES["gates"])

    def mean(gates):
        return LOSS(PARAMS, {"gates": unravel(gates)}, TOKENS).mean()

    return jax.jit(lambda m: (jax.grad(mean)(m), jax.hessian(mean)(m)))(ones)


@pytest.mark.parametrize("exact", ["kf", "k"])
def test_it_is_the_diagonal_of_the_hessian(by_hessian, exact):
    g, h = by_hessian
    samples = 600
    scores = scorers.score(scorers.curvature(LOSS, samples, exact=exact), PARAMS, PROBES, [TOKENS])
    letters = np.concatenate([np.full(x.shape, path[-1].key) for path, x in jax.tree_util.tree_leaves_with_path(scores)])
    error = np.abs(ravel_pytree(scores)[0] - (0.5 * jnp.diag(h) - g))
    scale = float(jnp.abs(jnp.diag(h)).max())
    assert scale > 1e-4
    assert error[np.isin(letters, list(exact))].max() < 1e-4 * scale
    estimated = ~np.isin(letters, list(exact))
    if estimated.any():  # five standard deviations of half the estimate
        others = np.asarray(h - jnp.diag(jnp.diag(h)))[estimated][:, estimated]
        assert (error[estimated] <= 2.5 * np.sqrt((others**2).sum(1) / samples) + 1e-4 * scale).all()


def test_a_unit_without_outgoing_weights_scores_zero():
    """In place of law 5: others may score below."""
    params = PARAMS | {"run_0": PARAMS["run_0"] | {"down": PARAMS["run_0"]["down"].at[0, 3].set(0)}}
    assert scorers.score(scorers.curvature(LOSS, 2, exact="k"), params, PROBES, [TOKENS])[0]["f"][3] == 0


def test_bad_input():
    with pytest.raises(ValueError, match="samples: 0 given; at least 1"):
        scorers.curvature(LOSS, 0)
    with pytest.raises(ValueError, match=r"exact: axes \['x'\] given; the model has gates on \['f', 'k'\]"):
        scorers.score(scorers.curvature(LOSS, exact="kx"), PARAMS, PROBES, [TOKENS])
