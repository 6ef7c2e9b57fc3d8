"""The scorer protocol: pure functions, as `optax.GradientTransformation` is two."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

Axis: TypeAlias = str
Params: TypeAlias = Any  # any pytree
Tokens: TypeAlias = Any  # any pytree of arrays whose leading axis is the sequence
Probes: TypeAlias = dict[str, Any]
State: TypeAlias = Any
Scores: TypeAlias = tuple[dict[Axis, jax.Array], ...]  # per layer: axis -> float32[units], larger = keep
LossFn: TypeAlias = Callable[[Params, Probes, Tokens], jax.Array]  # -> float32[b], one loss per sequence


class Scorer(NamedTuple):
    """Turns calibration batches into one number per unit.

    Attributes:
      init: probe templates -> state, before any data.
      update: (state, params, probe templates, tokens) -> state. Pure: runs under `jit`, `pmap` and on a mesh.
      finalize: state -> scores, float32. Larger means keep.
      additive: the state is a sum over sequences, so batches may come in any number. Otherwise the whole calibration set
        goes through one `update`.
      needs: what is read: `weights`, `activations` or `gradients`. One that reads weights alone ignores the tokens.
    """

    init: Callable[[Probes], State]
    update: Callable[[State, Params, Probes, Tokens], State]
    finalize: Callable[[State], Scores]
    additive: bool = True
    needs: str = "gradients"


def score(scorer: Scorer, params: Params, probes: Probes, batches: Iterable[Tokens] = ()) -> Scores:
    """Drives a scorer over calibration batches.

    Args:
      scorer: what to compute.
      params: the model's weights.
      probes: templates of the model's probes: `{"gates": PerLayer, "taps": PerLayer}`, as `jaxprune.models.probes` makes them.
      batches: trees of arrays with the sequences on the leading axis; concatenated first if the scorer is not additive.

    Returns:
      One dict per layer, axis letter -> float32[units]. Larger means keep.

    Raises:
      ValueError: no batches were given to a scorer that needs data.

    >>> import jax, jax.numpy as jnp
    >>> from jaxprune import scorers
    >>> loss = lambda w, probes, x: (probes["gates"][0]["f"] * w * x[:, None]).sum(-1)
    >>> probes = {"gates": ({"f": jnp.ones(2)},)}
    >>> scorers.score(scorers.fisher(loss), jnp.array([1.0, 3.0]), probes, [jnp.array([1.0, 2.0])])[0]["f"].tolist()
    [2.5, 22.5]
    """
    step = jax.jit(scorer.update, donate_argnums=0)
    state = scorer.init(probes)
    if scorer.needs == "weights":
        return scorer.finalize(jax.tree.map(_at_hand, step(state, params, probes, None)))
    if not scorer.additive and (every := list(batches)):
        batches = every if len(every) == 1 else [jax.tree.map(lambda *x: jnp.concatenate(x), *every)]
    empty = True
    for tokens in batches:
        state, empty = jax.block_until_ready(step(state, params, probes, tokens)), False  # progress tells the truth
    if empty:
        raise ValueError(f"batches: none given; a scorer that needs {scorer.needs} needs at least one calibration batch")
    return scorer.finalize(jax.tree.map(_at_hand, state))


def _at_hand(x: jax.Array) -> Any:
    """`x`, or an array of the host where its parts lie on devices of several processes: to finalize is work of the host."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return x
    return multihost_utils.process_allgather(x, tiled=True)


def zeros(tree: Any) -> Any:
    """Float32 zeros of the tree's shapes."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


class Mean(NamedTuple):
    """A sum over sequences and how many there were."""

    total: Any
    sequences: jax.Array

    def value(self) -> Any:
        """The mean, as a tree."""
        return jax.tree.map(lambda x: x / self.sequences, self.total)


def add_to(mean: Mean, increment: Any, sequences: int, axis_name: str | None, summed: bool = False) -> Mean:
    """Adds the sum over `sequences` sequences, and over the devices of a mapped axis unless they are `summed` already."""
    count = jnp.float32(sequences)
    if axis_name is not None:
        check_axis(axis_name)
        count = jax.lax.psum(count, axis_name)
        increment = increment if summed else jax.lax.psum(increment, axis_name)
    return Mean(jax.tree.map(jnp.add, mean.total, increment), mean.sequences + count)


def sequences_in(tokens: Tokens) -> int:
    """Number of sequences in a batch."""
    return jax.tree.leaves(tokens)[0].shape[0]


def check_axis(axis_name: str) -> None:
    """Raises ValueError inside a `shard_map` that sums, on its own, gradients by what its devices share."""
    index = jax.typeof(jax.lax.axis_index(axis_name))
    if index.manual_axis_type.varying if hasattr(index, "manual_axis_type") else index.vma:  # jax 0.10.2, 0.10.0
        raise ValueError(
            "shard_map: check_vma=True given, under which gradients are summed over devices before a scorer squares them or "
            "takes their absolute value; set check_vma=False, or use scorers.mapped"
        )
