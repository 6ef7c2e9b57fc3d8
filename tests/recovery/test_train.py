import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune import recovery


def test_losses_fall_and_the_callers_arrays_stay_as_they_were(toy):
    seen = []
    trained, losses = recovery.fit(*toy[:4], optax.sgd(0.1), steps=20, callback=lambda *args: seen.append(args))
    assert losses.dtype == np.float32 and losses[-1] < 0.2 * losses[0]
    assert seen == [(i, float(x)) for i, x in enumerate(losses)]
    assert trained["w"].any() and not toy.adapter["w"].any()


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulation_is_exact_whatever_the_weights_of_the_parts(toy, parts):
    args, tx = (toy.loss, toy.params, toy.adapter, toy.ragged), optax.sgd(0.1)
    whole, losses = recovery.fit(*args, tx, steps=5)
    split, same = recovery.fit(*args, tx, steps=5, accumulate=parts)
    np.testing.assert_allclose(losses, same, rtol=1e-5)
    chex.assert_trees_all_close(whole, split, rtol=1e-5)


def test_the_frozen_model_is_an_argument_not_a_constant(toy):
    sizes = []

    def loss(adapter, params, batch):
        assert isinstance(params["big"], jax.core.Tracer)
        sizes.append(params["big"].size)
        return toy.loss(adapter, params["big"].sum(), batch)

    recovery.fit(loss, dict(big=jnp.ones(5)), toy.adapter, toy.batches, optax.sgd(0.1), steps=3)
    assert sizes and set(sizes) == {5}


def test_a_loss_that_is_not_finite_stops(toy):
    with pytest.raises(ValueError, match="step 0: the loss is nan and .*; lower the learning rate"):
        recovery.fit(toy.loss, jnp.float32(jnp.nan), toy.adapter, toy.batches, optax.sgd(0.1), steps=1)


def test_a_gradient_that_is_not_finite_stops_before_it_is_saved(tmp_path):
    def loss(adapter, params, batch):
        return jnp.sqrt(adapter["w"]).sum(), jnp.float32(1)

    with pytest.raises(ValueError, match="step 0: the loss is 0.0 and the norm of its gradient inf; lower the learning rate"):
        recovery.fit(
            loss, jnp.ones(1), dict(w=jnp.zeros(2)), lambda _: jnp.ones(1), optax.sgd(1.0), steps=2, checkpoint_dir=tmp_path
        )
    assert not any(path.name.isdigit() for path in tmp_path.iterdir())


def test_a_batch_without_weight_is_refused(toy):
    def batches(step):
        return toy.batches(step) | dict(weight=jnp.full(8, float(step != 1)))

    with pytest.raises(ValueError, match="step 1: the batch's weights sum to 0.0; give at least one"):
        recovery.fit(*toy[:3], batches, optax.sgd(0.1), steps=3)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(steps=0), "steps: 0 given; it must be at least 1"),
        (dict(accumulate=0), "accumulate: 0 given; it must be at least 1"),
        (dict(save_every=0), "save_every: 0 given; it must be at least 1"),
        (dict(accumulate=3), "accumulate: 3 given; it must divide the 8 sequences"),
    ],
)
def test_bad_options_are_refused(toy, options, message):
    with pytest.raises(ValueError, match=message):
        recovery.fit(*toy[:4], optax.sgd(0.1), **dict(steps=2) | options)


@pytest.mark.parametrize(
    "args, message",
    [
        (dict(learning_rate=0.0), "learning_rate: 0.0 given"),
        (dict(learning_rate=float("inf")), "learning_rate: inf given"),
        (dict(steps=0), "steps: 0 given"),
        (dict(steps=5, warmup=5), "warmup: 5 given; it must be at least 0 and less than the 5 steps"),
        (dict(clip=0.0), "clip: 0.0 given"),
    ],
)
def test_bad_optimizer_settings_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        recovery.schedule_and_optimizer(**dict(learning_rate=1e-3, steps=10) | args)


def test_updates_are_clipped_and_decay_to_nothing():
    schedule, tx = recovery.schedule_and_optimizer(0.5, 4, warmup=1, clip=1.0)
    np.testing.assert_allclose([schedule(s) for s in range(5)], [0.25, 0.5, 1 / 3, 1 / 6, 0], atol=1e-7)
    params = dict(w=jnp.zeros(3))
    small, _ = tx.update(dict(w=jnp.array([0.6, 0.0, 0.8])), tx.init(params), params)
    large, state = tx.update(dict(w=jnp.array([600.0, 0.0, 800.0])), tx.init(params), params)
    chex.assert_trees_all_close(small, large, rtol=1e-5)
    np.testing.assert_allclose(optax.tree.get(state, "mu")["w"], [0.06, 0, 0.08], rtol=1e-5)
