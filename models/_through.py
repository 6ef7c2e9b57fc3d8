"""The residual stream through all layers of a model, whatever a layer is: runs, probes, microbatches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.models import _taps
from jaxprune.models._how import rematerialised
from jaxprune.models._kinds import told
from jaxprune.models._mesh import by_sequence, from_parts, in_parts
from jaxprune.models.types import TAP_KINDS, Config, Params, PerLayer, Probes

Block = Callable[[dict, jax.Array, Probes], jax.Array]  # arrays of a layer, residual stream, probes of the layer


def through(
    params: Params,
    x: jax.Array,
    cfg: Config,
    block: Block,
    probes: Probes,
    *,
    remat: bool,
    microbatch: int | None,
    axis_name: str | None,
) -> jax.Array:
    """The residual stream after all layers, [b, t, d]; `block` is one of them, the other arguments as in `hidden`."""
    for run in cfg.runs:
        arrays = told(params.get(run.name, {}), run)
        if not arrays:
            continue

        def layer(x, z):
            return _layer(z[0], by_sequence(x), block, z[1], microbatch, axis_name), None

        stacked = {kind: _stack(per_layer, run.start, run.length) for kind, per_layer in probes.items()}
        x, _ = jax.lax.scan(rematerialised(layer) if remat else layer, x, (arrays, stacked))
    return x


def _stack(per_layer: PerLayer | None, start: int, length: int) -> Any:
    return {} if per_layer is None else jax.tree.map(lambda *x: jnp.stack(x), *per_layer[start : start + length])


def _layer(p, x, block: Block, probes, microbatch, axis_name):
    taps = {kind: probes[kind] for kind in TAP_KINDS if kind in probes}
    p, squares = _taps.outer(p, taps, axis_name)
    return _in_microbatches(lambda x: block(_taps.inner(p, squares), x, probes), x, 1 if squares else microbatch)


def _in_microbatches(f: Callable[[jax.Array], jax.Array], x: jax.Array, microbatch: int | None) -> jax.Array:
    """`f(x)`, so many sequences at a time; None is all of them."""
    b = x.shape[0]
    if microbatch is None or microbatch >= b:
        return f(x)
    if b % microbatch:
        raise ValueError(f"microbatch: {microbatch} given; it must divide the batch of {b} sequences")
    return from_parts(jax.lax.map(f, in_parts(x, microbatch)))
