"""A least-squares problem that trains in milliseconds, for what does not depend on the model."""

from typing import Any, NamedTuple

import pytest


class Toy(NamedTuple):
    """Arguments of `fit` up to the batches; those of `ragged` have parts without weight."""

    loss: Any
    params: Any
    adapter: Any
    batches: Any
    ragged: Any


@pytest.fixture(scope="session")
def toy() -> Toy:
    import jax
    import jax.numpy as jnp

    def loss(adapter, params, batch):
        total = (batch["weight"] * jnp.square(batch["x"] @ adapter["w"] - params)).sum()
        return total / jnp.maximum(batch["weight"].sum(), 1e-30), batch["weight"].sum()

    def with_weights(*weights):
        return lambda step: dict(x=jax.random.uniform(jax.random.key(step), (8, 3)), weight=jnp.array(weights))

    even, ragged = with_weights(*[1.0] * 8), with_weights(0.0, 0.0, 1.0, 12.0, 5.0, 2.0, 0.0, 9.0)
    return Toy(loss, jnp.float32(1), dict(w=jnp.zeros(3)), even, ragged)
