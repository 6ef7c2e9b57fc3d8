"""The residual stream through all layers of a model, whatever a layer is: runs, probes, microbatches."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxprune.models import _taps
from jaxprune.models._how import LAYER_INPUT, rematerialised
from jaxprune.models._kinds import told
from jaxprune.models._mesh import by_sequence, from_parts, in_parts
from jaxprune.models.config import Run
from jaxprune.models.types import TAP_KINDS, Config, Params, Probes

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
            x = checkpoint_name(by_sequence(x), LAYER_INPUT)
            return _layer(z[0], x, block, z[1], microbatch, axis_name), None

        for first, last, stacked in _alike(probes, run):
            x = over_layers(layer, x, arrays, stacked, first, last, remat=remat)[0]
    return x


def over_layers(
    layer: Callable, x: Any, arrays: dict, others: Any, first: int, last: int, *, remat: bool = False
) -> tuple[Any, Any]:
    """`lax.scan` of `layer(x, (arrays of a layer, others of a layer))` over the layers `first` to `last` of a run, half-open.

    Of some layers of a run the arrays are taken one by one where they are needed, for a slice would copy them.

    Args:
      layer: what is done in a layer.
      x: what goes through.
      arrays: of the whole run, [l, ...].
      others: of the layers `first` to `last`, [last - first, ...].
      remat: what happens in a layer is computed again for the backward pass, the arrays are taken again, too.
    """
    if (first, last) == (0, len(jax.tree.leaves(arrays)[0])):
        return jax.lax.scan(rematerialised(layer) if remat else layer, x, (arrays, others))

    def at(x, z):
        i, mine = z
        own = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), arrays)
        return layer(x, (own, mine))

    return jax.lax.scan(rematerialised(at) if remat else at, x, (jnp.arange(first, last), others))


def _alike(probes: Probes, run: Run) -> Iterator[tuple[int, int, Any]]:
    """Consecutive layers of a run that have the same probes: the first, the one behind the last, and their probes stacked."""
    given = {kind: per_layer for kind, per_layer in probes.items() if per_layer is not None}
    layers = [{kind: given[kind][run.start + i] for kind in given} for i in range(run.length)]
    first = 0
    for _, group in itertools.groupby(layers, jax.tree.structure):
        some = list(group)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *some)
        yield first, first + len(some), stacked | {kind: {} for kind in probes if kind not in given}
        first += len(some)


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
