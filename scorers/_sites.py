"""Scorers from activations: sums over tokens of what a reduction finds at each sublayer."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp

from jaxprune.scorers._base import Axis, Params, Scorer, Scores, State, Tokens, sequences_in, zeros


@runtime_checkable
class Site(Protocol):
    """A sublayer while tokens go through it: `jaxprune.models.Site` is one.

    Attributes:
      w: its output projection, [units..., d].
      z: what the projection reads, [b, t, units...].
      read: what the sublayer reads, after its norm, [b, t, d].
      before, after: the residual stream around it, [b, t, d].
    """

    w: jax.Array
    z: jax.Array
    read: jax.Array
    before: jax.Array
    after: jax.Array


Sites: TypeAlias = dict[Axis, Site]  # of one layer
Observe: TypeAlias = Callable[[Params, Tokens, Callable[[Sites], Any]], tuple]  # (params, tokens, reduce) -> per layer


def from_sites(
    observe: Observe,
    collect: Callable[[Sites], Any],
    weigh: Callable[[Axis, jax.Array], Any],
    finish: Callable[[tuple, tuple, jax.Array], Scores],
    axis_name: str | None = None,
) -> Scorer:
    """An additive scorer of sums over tokens and of weights.

    Args:
      observe: runs the model.
      collect: sites of one layer -> tree of float32 sums over the tokens of the batch.
      weigh: axis letter, output projection -> tree of what is read of the weights; it is not summed.
      finish: (sums per layer, weights per layer, number of tokens) -> scores.
      axis_name: mapped axis that the sequences are spread over, or None.
    """

    def reduce(sites: Sites) -> tuple[Any, dict]:
        return collect(sites), {a: weigh(a, s.w) for a, s in sites.items()}

    def init(probes: Any) -> State:
        layers = zip(probes["inputs"], probes["output"], strict=True)
        sites = ({a: _like(x, output[a].shape[0]) for a, x in inputs.items()} for inputs, output in layers)
        empty = [zeros(jax.eval_shape(reduce, layer)) for layer in sites]
        return tuple(s for s, _ in empty), tuple(w for _, w in empty), jnp.float32(0)

    def update(state, params, probes, tokens):
        del probes
        seen = observe(params, tokens, reduce)
        sums, weights = tuple(s for s, _ in seen), tuple(w for _, w in seen)
        count = jnp.float32(sequences_in(tokens) * jax.tree.leaves(tokens)[0].shape[1])
        if axis_name is not None:
            sums, count = jax.lax.psum((sums, count), axis_name)
        return jax.tree.map(jnp.add, state[0], sums), weights, state[2] + count

    return Scorer(init, update, lambda state: finish(*state), needs="activations")


class _Like(NamedTuple):
    """The shapes of a site through which one token goes."""

    w: Any
    z: Any
    read: Any
    before: Any
    after: Any


def _like(x: jax.Array, d: int) -> _Like:
    w, z, stream = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*x.shape, d), (1, 1, *x.shape), (1, 1, d)))
    return _Like(w, z, stream, stream, stream)


def grams(sites: Sites) -> dict[Axis, jax.Array]:
    """Sum over tokens of x x^T of what each output projection reads, float32[inputs, inputs]."""
    rows = {a: tokens_axes(s.z).reshape(-1, math.prod(s.z.shape[2:])) for a, s in sites.items()}
    return {a: jnp.matmul(x.T, x, precision="highest") for a, x in rows.items()}


def over_units(x: jax.Array, how: Callable = jnp.sum) -> jax.Array:
    """Reduces [units, ...] to [units]."""
    return how(x.reshape(x.shape[0], -1), axis=1)


def tokens_axes(x: jax.Array) -> jax.Array:
    """[b, t, ...] as float32[b * t, ...]."""
    return x.reshape(-1, *x.shape[2:]).astype(jnp.float32)
