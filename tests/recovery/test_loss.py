import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune import models, recovery

ALPHA = 8


@pytest.fixture(scope="module")
def start(tiny):
    """The tiny model with a head that can be sure of itself, and an adapter that does nothing yet."""
    params = tiny.params | dict(head=20 * tiny.params["head"])
    return params, recovery.lora.init(jax.random.key(1), params, tiny.cfg, rank=4)


@pytest.fixture(scope="module")
def grad(tiny):
    return jax.jit(jax.value_and_grad(recovery.lm_loss(tiny.cfg, alpha=ALPHA), has_aux=True))


def counting(step, b=8, t=12):
    """Sequences that count upwards modulo 16: the next token follows from the last."""
    first = jax.random.randint(jax.random.fold_in(jax.random.key(3), step), (b, 1), 0, 16)
    return dict(tokens=(first + jnp.arange(t)) % 16, weights=jnp.ones((b, t)))


def ragged(step):
    """Batches whose eighths have unequal weight, some of them none."""
    lengths = jnp.array([0, 0, 1, 12, 5, 2, 0, 9])[:, None]
    return counting(step) | dict(weights=(jnp.arange(12) < lengths).astype(jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_training_learns_to_count(start, tiny, dtype):
    params, adapter = jax.tree.map(lambda x: x.astype(dtype), start[0]), start[1]
    loss = recovery.lm_loss(tiny.cfg, alpha=ALPHA)
    _, tx = recovery.schedule_and_optimizer(2e-2, 80, warmup=5)
    trained, losses = recovery.fit(loss, params, adapter, counting, tx, steps=80)
    assert losses.dtype == np.float32 and losses.shape == (80,)
    assert losses[-5:].mean() < 0.5 * losses[0]
    chex.assert_trees_all_equal_shapes_and_dtypes(trained, adapter)

    merged, batch = recovery.lora.merge(params, trained, alpha=ALPHA), counting(999)
    mean, _ = loss(trained, params, batch)
    np.testing.assert_allclose(models.loss_fn(tiny.cfg)(merged, {}, batch["tokens"]).mean(), mean, rtol=0.03)


def test_accumulation_equals_one_large_batch(start, tiny):
    # SGD, because Adam's first updates are the gradient's signs: rounding would show where the gradient is zero
    loss, tx = recovery.lm_loss(tiny.cfg, alpha=ALPHA), optax.sgd(0.1)
    whole, losses = recovery.fit(loss, *start, ragged, tx, steps=3)
    split, same = recovery.fit(loss, *start, ragged, tx, steps=3, accumulate=4)
    np.testing.assert_allclose(losses, same, rtol=1e-5)
    chex.assert_trees_all_close(whole, split, rtol=1e-3, atol=1e-5)


def test_tokens_of_weight_zero_do_not_change_loss_or_gradient(start, grad):
    params, adapter = start
    tokens = counting(0)["tokens"]
    weights = jnp.ones(tokens.shape).at[:, 8:].set(0)
    other = tokens.at[:, 8:].set((tokens[:, 8:] * 5 + 3) % 16)
    expected = grad(adapter, params, dict(tokens=tokens, weights=weights))
    chex.assert_trees_all_equal(expected, grad(adapter, params, dict(tokens=other, weights=weights)))
    (loss, _), _ = grad(adapter, params, dict(tokens=other, weights=jnp.ones(tokens.shape)))
    assert abs(loss - expected[0][0]) > 1e-3


def test_a_prompt_of_weight_zero_is_read_but_not_learnt(start, tiny, grad):
    params, adapter = start
    tokens = counting(0)["tokens"]
    weights = jnp.zeros(tokens.shape).at[:, 6:].set(1)
    nll = models.token_losses(params, models.hidden(params, tokens[:, :-1], tiny.cfg), tokens[:, 1:], tiny.cfg)
    (mean, weight), _ = grad(adapter, params, dict(tokens=tokens, weights=weights))
    np.testing.assert_allclose(mean, nll[:, 5:].mean(), rtol=1e-5)
    assert weight == 8 * 6
    (other, _), _ = grad(adapter, params, dict(tokens=tokens.at[:, 0].add(5) % 16, weights=weights))
    assert other != mean


def test_data_parallel_training_equals_one_device_also_when_resumed(start, tiny, tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))
    spread = (jax.device_put(start[0], everywhere), start[1])
    loss, tx = recovery.lm_loss(tiny.cfg, alpha=ALPHA), optax.sgd(0.1)
    expected, losses = recovery.fit(loss, *start, ragged, tx, steps=4)

    def stop(step, _):
        if step == 2:
            raise KeyboardInterrupt

    def batches(step):
        return jax.device_put(ragged(step), rows)

    options = dict(steps=4, checkpoint_dir=tmp_path, save_every=2, resume=True)
    with pytest.raises(KeyboardInterrupt):
        recovery.fit(loss, *spread, batches, tx, callback=stop, **options)
    got, same = recovery.fit(loss, *spread, batches, tx, **options)
    np.testing.assert_allclose(losses, same, rtol=1e-5)
    chex.assert_trees_all_close(expected, got, rtol=1e-3, atol=1e-5)
    assert got["run_0"]["q_a"].sharding.is_equivalent_to(everywhere, 4)


def test_a_model_that_is_not_finite_stops_training(start, tiny):
    params = start[0] | dict(norm=start[0]["norm"].at[0].set(jnp.inf))
    with pytest.raises(ValueError, match="step 0: the loss is nan .*; lower the learning rate"):
        recovery.fit(recovery.lm_loss(tiny.cfg, alpha=ALPHA), params, start[1], counting, optax.sgd(0.1), steps=1)
