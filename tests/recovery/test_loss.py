import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune import models, recovery

ALPHA = 8


@pytest.fixture(scope="module")
def cfg(tiny):
    return dataclasses.replace(tiny.cfg, layers=tiny.cfg.layers[:2])


@pytest.fixture(scope="module")
def start(tiny, cfg):
    """A model whose head can be sure of itself, and an adapter that does nothing yet."""
    params = {name: tiny.params[name] for name in ("embed", "norm", "run_0")} | dict(head=20 * tiny.params["head"])
    return params, recovery.lora.init(jax.random.key(1), params, cfg, rank=4)


@pytest.fixture(scope="module")
def grad(cfg):
    return jax.jit(jax.value_and_grad(recovery.lm_loss(cfg, alpha=ALPHA), has_aux=True))


@pytest.fixture(scope="module")
def whole(start, cfg):
    """Four steps on one device without accumulation, by SGD: Adam's first updates are signs, which rounding can turn."""
    return recovery.fit(recovery.lm_loss(cfg, alpha=ALPHA), *start, ragged, optax.sgd(0.1), steps=4)


def counting(step, b=8, t=12):
    """Sequences that count upwards modulo 16: the next token follows from the last."""
    first = jax.random.randint(jax.random.fold_in(jax.random.key(3), step), (b, 1), 0, 16)
    return dict(tokens=(first + jnp.arange(t)) % 16, weights=jnp.ones((b, t)))


def ragged(step):
    """Batches whose eighths have unequal weight, some of them none."""
    lengths = jnp.array([0, 0, 1, 12, 5, 2, 0, 9])[:, None]
    return counting(step) | dict(weights=(jnp.arange(12) < lengths).astype(jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_training_learns_to_count(start, cfg, dtype):
    params, adapter = jax.tree.map(lambda x: x.astype(dtype), start[0]), start[1]
    loss = recovery.lm_loss(cfg, alpha=ALPHA)
    _, tx = recovery.schedule_and_optimizer(2e-2, 80, warmup=5)
    trained, losses = recovery.fit(loss, params, adapter, counting, tx, steps=80)
    assert losses.dtype == np.float32 and losses.shape == (80,)
    assert losses[-5:].mean() < 0.5 * losses[0]
    chex.assert_trees_all_equal_shapes_and_dtypes(trained, adapter)


def test_accumulation_equals_one_large_batch(start, cfg, whole):
    loss = recovery.lm_loss(cfg, alpha=ALPHA)
    split, losses = recovery.fit(loss, *start, ragged, optax.sgd(0.1), steps=4, accumulate=4)
    np.testing.assert_allclose(losses, whole[1], rtol=1e-5)
    chex.assert_trees_all_close(split, whole[0], rtol=1e-3, atol=1e-5)


def test_tokens_of_weight_zero_do_not_change_loss_or_gradient(start, grad):
    params, adapter = start
    tokens = counting(0)["tokens"]
    weights = jnp.ones(tokens.shape).at[:, 8:].set(0)
    other = tokens.at[:, 8:].set((tokens[:, 8:] * 5 + 3) % 16)
    expected = grad(adapter, params, dict(tokens=tokens, weights=weights))
    chex.assert_trees_all_equal(expected, grad(adapter, params, dict(tokens=other, weights=weights)))
    (loss, _), _ = grad(adapter, params, dict(tokens=other, weights=jnp.ones(tokens.shape)))
    assert abs(loss - expected[0][0]) > 1e-3


def test_a_prompt_of_weight_zero_is_read_but_not_learnt(start, cfg, grad):
    params, adapter = start
    tokens = counting(0)["tokens"]
    weights = jnp.zeros(tokens.shape).at[:, 6:].set(1)
    nll = models.token_losses(params, models.hidden(params, tokens[:, :-1], cfg), tokens[:, 1:], cfg)
    (mean, weight), _ = grad(adapter, params, dict(tokens=tokens, weights=weights))
    np.testing.assert_allclose(mean, nll[:, 5:].mean(), rtol=1e-5)
    assert weight == 8 * 6
    (other, _), _ = grad(adapter, params, dict(tokens=tokens.at[:, 0].add(5) % 16, weights=weights))
    assert other != mean


def test_data_parallel_training_equals_one_device_also_when_resumed(start, cfg, whole, tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))
    spread = (jax.device_put(start[0], everywhere), start[1])
    loss, tx = recovery.lm_loss(cfg, alpha=ALPHA), optax.sgd(0.1)

    def stop(step, _):
        if step == 2:
            raise KeyboardInterrupt

    def batches(step):
        return jax.device_put(ragged(step), rows)

    options = dict(steps=4, checkpoint_dir=tmp_path, save_every=2, resume=True)
    with pytest.raises(KeyboardInterrupt):
        recovery.fit(loss, *spread, batches, tx, callback=stop, **options)
    got, losses = recovery.fit(loss, *spread, batches, tx, **options)
    np.testing.assert_allclose(losses, whole[1], rtol=1e-5)
    chex.assert_trees_all_close(got, whole[0], rtol=1e-3, atol=1e-5)
    assert got["run_0"]["q_a"].sharding.is_equivalent_to(everywhere, 4)
