"""Training of adapters on a frozen model: Optax for the updates, Orbax for the checkpoints, one jitted step."""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune.models import Params
from jaxprune.models._mesh import in_parts
from jaxprune.recovery import _checkpoints
from jaxprune.recovery.loss import AdapterLoss


class State(NamedTuple):
    """What a step changes and a checkpoint holds.

    Attributes:
      step: int32, updates done.
      adapter: the trained arrays.
      opt_state: of Optax.
      losses: float32[steps]; those of updates to come are NaN.
    """

    step: jax.Array
    adapter: Any
    opt_state: optax.OptState
    losses: jax.Array


def schedule_and_optimizer(
    learning_rate: float, steps: int, *, warmup: int = 0, weight_decay: float = 0.0, clip: float | None = 1.0
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """AdamW with gradients clipped by their global norm and a learning rate that rises linearly, then falls linearly to zero.

    The rate of update s (from 0) is `learning_rate * (s + 1) / (warmup + 1)` up to s = warmup, then falls by
    `learning_rate / (steps - warmup)` an update.

    Args:
      learning_rate: the highest rate.
      steps: updates in all.
      warmup: updates before the highest rate.
      weight_decay: decoupled, per unit of learning rate.
      clip: largest global norm of a gradient, or None.

    >>> schedule, tx = schedule_and_optimizer(1e-4, 8, warmup=3)
    >>> [round(float(schedule(s)) * 1e4, 2) for s in range(9)]
    [0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0]

    Reference: Ma et al., `LLM-Pruner <https://arxiv.org/abs/2305.11627>`_, 2023, appendix B.2, with the same betas, decay 0 and
    clipping at 1. Theirs starts from a rate of zero, so its first update does nothing.
    """
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(f"learning_rate: {learning_rate} given; it must be a positive number, such as 1e-4")
    if steps < 1:
        raise ValueError(f"steps: {steps} given; it must be at least 1")
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup: {warmup} given; it must be at least 0 and less than the {steps} steps")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: {clip} given; it must be a positive norm, or None for no clipping")
    rise = optax.linear_schedule(learning_rate / (warmup + 1), learning_rate, warmup) if warmup else None
    fall = optax.linear_schedule(learning_rate, 0.0, steps - warmup)
    schedule = optax.join_schedules([rise, fall], [warmup]) if rise else fall
    adamw = optax.adamw(schedule, weight_decay=weight_decay)
    return schedule, adamw if clip is None else optax.chain(optax.clip_by_global_norm(clip), adamw)


def fit(
    loss: AdapterLoss,
    params: Params,
    adapter: Any,
    batches: Callable[[int], Any],
    tx: optax.GradientTransformation,
    *,
    steps: int,
    accumulate: int = 1,
    checkpoint_dir: str | Path | None = None,
    save_every: int = 25,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
    callback: Callable[[int, float], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[Any, np.ndarray]:
    """Minimises `loss` over the adapter; killed at any moment and resumed, it gives the losses of the run that was not.

    Args:
      loss: pure; its result and its gradient are means that count by the weight it returns beside them.
      params: the frozen model; neither copied nor changed.
      adapter: the arrays to train; not changed.
      batches: step (from 0) -> a tree of arrays whose first axis is the sequence; the same batch whenever it is asked for a
        step.
      tx: an Optax transformation, such as that of `schedule_and_optimizer`.
      steps: updates in all, those before a resumption included.
      accumulate: equal parts that each batch goes through in turn, to save memory; exact, whatever the weights of the parts.
      checkpoint_dir: folder for checkpoints, or None for none.
      save_every: updates between checkpoints; the last update is always saved.
      resume: go on from the last checkpoint in `checkpoint_dir`, if there is one.
      settings: what else determines the run (data, learning rate, seed, the model), as JSON values; kept in checkpoints, and
        a resumption with others is refused. `steps`, `accumulate` and the shapes of the state are added.
      callback: called after each update with its step (from 0) and loss.
      stop: called after each update; where it returns True, a checkpoint is written (if there is a folder) and training ends.

    Returns:
      The trained adapter, and float32[steps]: the loss of each step's batch before its update.

    Raises:
      KeyboardInterrupt: `stop` returned True.
      ValueError: an option out of range, a batch without weight, checkpoints of other settings, or a loss or gradient that is
        not finite (the last checkpoint stays good).
    """
    for name, number in dict(steps=steps, accumulate=accumulate, save_every=save_every).items():
        if number < 1:
            raise ValueError(f"{name}: {number} given; it must be at least 1")
    if resume and checkpoint_dir is None:
        raise ValueError("resume: needs checkpoint_dir, the folder of the run to go on with")
    adapter = jax.tree.map(jnp.array, adapter)  # a copy: the steps donate it
    state = _place(State(jnp.int32(0), adapter, tx.init(adapter), jnp.full(steps, jnp.nan, jnp.float32)), params)
    tied = dict(settings or {}) | dict(steps=steps, accumulate=accumulate, state=_describe(state))
    shardings = jax.tree.map(lambda x: x.sharding, state)
    update = jax.jit(functools.partial(update_state, loss, tx, accumulate), donate_argnums=0, out_shardings=(shardings, None))

    with contextlib.ExitStack() as stack:
        manager = None
        if checkpoint_dir is not None:
            manager = stack.enter_context(_checkpoints.open_folder(checkpoint_dir))
            state = _checkpoints.restore(manager, state, tied, resume=resume)
        for step in range(int(state.step), steps):
            state, seen = update(state, params, batches(step))
            value = _check(step, *map(float, seen))
            leave = stop is not None and stop()
            if manager is not None and ((step + 1) % save_every == 0 or step + 1 == steps or leave):
                _checkpoints.save(manager, step + 1, state, tied)
            if callback is not None:
                callback(step, value)
            if leave:
                raise KeyboardInterrupt
    return state.adapter, np.asarray(state.losses)


def update_state(
    loss: AdapterLoss, tx: optax.GradientTransformation, accumulate: int, state: State, params: Params, batch: Any
) -> tuple[State, tuple[jax.Array, jax.Array, jax.Array]]:
    """One update; also the mean loss, the weight of the batch and the norm of the gradient."""
    b = jax.tree.leaves(batch)[0].shape[0]
    if b % accumulate:
        raise ValueError(f"accumulate: {accumulate} given; it must divide the {b} sequences of a batch")

    def total(adapter, part):
        mean, weight = loss(adapter, params, part)
        return mean * weight, weight

    def add(sums, part):
        (value, weight), grads = jax.value_and_grad(total, has_aux=True)(state.adapter, part)
        return jax.tree.map(jnp.add, sums, (value, weight, grads)), None

    zeros = (0.0, 0.0, jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.adapter))
    parts = jax.tree.map(lambda x: in_parts(x, b // accumulate), batch)
    (value, weight, grads), _ = jax.lax.scan(add, jax.tree.map(jnp.float32, zeros), parts)
    grads = jax.tree.map(lambda g, x: (g / weight).astype(x.dtype), grads, state.adapter)
    updates, opt_state = tx.update(grads, state.opt_state, state.adapter)
    adapter = optax.apply_updates(state.adapter, updates)
    new = State(state.step + 1, adapter, opt_state, state.losses.at[state.step].set(value / weight))
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    return new, (value / weight, weight, optax.tree.norm(grads))


def _check(step: int, loss: float, weight: float, norm: float) -> float:
    if not weight > 0:
        raise ValueError(f"step {step}: the batch's weights sum to {weight}; give at least one of its tokens a positive weight")
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise ValueError(
            f"step {step}: the loss is {loss} and the norm of its gradient {norm}; lower the learning rate, "
            "use float32 or bfloat16 (float16 overflows), or remove what is wrong in this batch"
        )
    return loss


def _place(state: State, params: Params) -> State:
    """Puts what has no place of its own where the model is: on its device, or on all of its mesh."""
    home = jnp.asarray(jax.tree.leaves(params)[0]).sharding
    if isinstance(home, jax.sharding.NamedSharding):
        home = jax.sharding.NamedSharding(home.mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda x: x if x.committed else jax.device_put(x, home), state)


def _describe(state: State) -> dict[str, str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path((state.adapter, state.opt_state))
    return {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}
