"""Losses of many candidates by gates: nothing is cut, and one compiled program serves all of them on every device."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxprune import surgery
from jaxprune._beside import home, spread
from jaxprune.models import LlamaConfig, Params, loss_fn
from jaxprune.models._mesh import on_host
from jaxprune.plan import Plan

Fitness: TypeAlias = Callable[[Sequence[Plan]], np.ndarray]  # plans -> float64[plans], nats a token, lower is better
DIGITS = 5  # losses are rounded to so many, so that the order of additions on other devices does not decide a search


def gate_fitness(
    params: Params,
    cfg: LlamaConfig,
    tokens: Any,
    *,
    at_once: int = 1,
    microbatch: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Fitness:
    """The mean loss of each candidate on the same tokens, with the units that its plan does not keep gated off.

    Candidates, never tokens, are spread over the devices, so the number of devices does not change what is computed. Of a model
    that is spread over a mesh itself, see `jaxprune.sharding`, each candidate is measured on all of it.

    Args:
      params, cfg: the model.
      tokens: int32[b, t] that the loss is measured on.
      at_once: candidates that a device evaluates together, by `vmap`.
      microbatch: sequences that go through a layer at a time; it divides b. None is all of them.
      devices: None is all of this process.

    Returns:
      A function of plans. It says `inf` where a loss is not a number.

    Raises:
      ValueError: `at_once` is less than 1.

    >>> import jax
    >>> from jaxprune import models, plan
    >>> from jaxprune.search import fitness
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> params, tokens = models.init(jax.random.key(0), cfg), jax.numpy.arange(12).reshape(2, 6)
    >>> loss_of = fitness.gate_fitness(params, cfg, tokens)
    >>> keep = [plan.Plan(({"f": range(n)},), ({"f": 48},)) for n in (48, 8)]
    >>> loss_of(keep).shape
    (2,)
    """
    losses = gate_losses(params, cfg, at_once=at_once, microbatch=microbatch, devices=devices)
    return lambda plans: losses(plans, tokens)


def gate_losses(
    params: Params,
    cfg: LlamaConfig,
    *,
    at_once: int = 1,
    microbatch: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Callable[[Sequence[Plan], Any], np.ndarray]:
    """`gate_fitness` for several texts: a function of plans and tokens, from one compiled program for each shape of tokens."""
    loss = loss_fn(cfg, remat=False, microbatch=microbatch)

    def one(constants, gates):
        params, tokens = constants
        return loss(params, {"gates": gates}, tokens).mean()

    measure = over_devices(one, at_once, devices, params)
    return lambda plans, tokens: measure(
        (params, spread(params, tokens)), [surgery.gates_of(plan, cfg)["gates"] for plan in plans]
    )


def over_devices(
    one: Callable[[Any, Any], jax.Array],
    at_once: int = 1,
    devices: Sequence[jax.Device] | None = None,
    params: Params | None = None,
) -> Callable[[Any, Sequence[Any]], np.ndarray]:
    """A function of many candidates, a few of them on each device, from one compiled program.

    Args:
      one: (constants, candidate) -> loss.
      at_once, devices: as in `gate_fitness`.
      params: the model; if it is spread over a mesh, all of that takes a few candidates at a time.

    Returns:
      (constants, candidates) -> float64[candidates], rounded; `inf` where a loss is not a number.

    Raises:
      ValueError: `at_once` is less than 1.
    """
    if at_once < 1:
        raise ValueError(f"at_once: {at_once} given; it must be at least 1")
    devices = jax.local_devices() if devices is None else devices
    mesh = jax.make_mesh((len(devices),), ("c",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    whole = home(params) is not None
    chunk = at_once if whole else len(devices) * at_once

    def some(constants, candidates):
        return jax.lax.map(functools.partial(one, constants), candidates, batch_size=at_once if at_once > 1 else None)

    many = jax.jit(some if whole else jax.shard_map(some, mesh=mesh, in_specs=(P(), P("c")), out_specs=P("c"), check_vma=False))

    def measure(constants: Any, candidates: Sequence[Any]) -> np.ndarray:
        found: list[float] = []
        for start in range(0, len(candidates), chunk):
            part = list(candidates[start : start + chunk])
            full = [*part, *part[:1] * (chunk - len(part))]
            found += on_host(many(constants, jax.tree.map(lambda *x: np.stack(x), *full))).tolist()[: len(part)]
        losses = np.round(np.array(found, np.float64), DIGITS)
        return np.where(np.isfinite(losses), losses, np.inf)

    return measure
