"""Scorers from scorers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxprune.scorers._base import Scorer, Scores, State

NEEDS = ("weights", "activations", "gradients")  # each includes the ones before it


def chain(scorer: Scorer, *transforms: Callable[[Scores], Scores]) -> Scorer:
    """Applies transforms to the finished scores, left to right.

    >>> import jax, jax.numpy as jnp
    >>> from jaxprune import scorers
    >>> s = scorers.chain(scorers.random(jax.random.key(0)), scorers.normalize())
    >>> round(float(scorers.score(s, None, {"gates": ({"f": jnp.ones(3)},)})[0]["f"].mean()), 6)
    1.0
    """

    def finalize(state: State) -> Scores:
        scores = scorer.finalize(state)
        for transform in transforms:
            scores = transform(scores)
        return scores

    return scorer._replace(finalize=finalize)


def _together(scorers: tuple[Scorer, ...], combine: Callable[[tuple[Scores, ...]], Scores]) -> Scorer:
    def init(probes):
        return tuple(s.init(probes) for s in scorers)

    def update(state, params, probes, tokens):
        return tuple(s.update(x, params, probes, tokens) for s, x in zip(scorers, state, strict=True))

    def finalize(state):
        return combine(tuple(s.finalize(x) for s, x in zip(scorers, state, strict=True)))

    needs = max((s.needs for s in scorers), key=NEEDS.index)
    return Scorer(init, update, finalize, additive=all(s.additive for s in scorers), needs=needs)


def mix(*weighted: tuple[float, Scorer]) -> Scorer:
    """The weighted sum of scorers; put them on one scale first, e.g. with `chain(s, normalize())`.

    Args:
      *weighted: pairs of weight and scorer. All must score the same units.

    Raises:
      ValueError: no pair was given.

    >>> import jax, jax.numpy as jnp
    >>> from jaxprune import scorers
    >>> r = scorers.random(jax.random.key(0))
    >>> a, b = (scorers.score(s, None, {"gates": ({"f": jnp.ones(3)},)}) for s in (r, scorers.mix((0.5, r), (0.5, r))))
    >>> bool(jnp.array_equal(a[0]["f"], b[0]["f"]))
    True
    """
    if not weighted:
        raise ValueError("mix: no scorers given; give pairs such as (0.5, scorer)")
    weights, scorers = zip(*weighted, strict=True)

    def combine(all_scores):
        return jax.tree.map(lambda *x: sum(w * s for w, s in zip(weights, x, strict=True)), *all_scores)

    return _together(scorers, combine)


def per_axis(**scorers: Scorer) -> Scorer:
    """Takes the scores of each axis from a scorer of its own; axes without one are not scored, so they are left alone.

    Args:
      **scorers: axis letter = scorer.

    Raises:
      ValueError: no scorer was given.

    >>> import jax, jax.numpy as jnp
    >>> from jaxprune import scorers
    >>> r = scorers.random(jax.random.key(0))
    >>> s = scorers.score(scorers.per_axis(f=r), None, {"gates": ({"k": jnp.ones(2), "f": jnp.ones(3)},)})
    >>> list(s[0])
    ['f']
    """
    if not scorers:
        raise ValueError("per_axis: no scorers given; give one for an axis letter, e.g. f=magnitude(...)")

    def combine(all_scores):
        by_axis = dict(zip(scorers, all_scores, strict=True))
        return tuple(
            {axis: by_axis[axis][i][axis] for axis in by_axis if axis in by_axis[axis][i]} for i in range(len(all_scores[0]))
        )

    return _together(tuple(scorers.values()), combine)


def scale(factors: dict[str, float]) -> Callable[[Scores], Scores]:
    """A transform that multiplies the scores of the named axes.

    >>> import jax.numpy as jnp
    >>> from jaxprune import scorers
    >>> scorers.scale({"k": 2.0})(({"k": jnp.ones(1), "f": jnp.ones(1)},))[0]["k"].tolist()
    [2.0]
    """
    return lambda scores: tuple({a: x * factors.get(a, 1.0) for a, x in layer.items()} for layer in scores)


def normalize(eps: float = 1e-12) -> Callable[[Scores], Scores]:
    """A transform that divides the scores of each layer and axis by their mean, so that layers compare.

    >>> import jax.numpy as jnp
    >>> from jaxprune import scorers
    >>> scorers.normalize()(({"f": jnp.array([1.0, 3.0])},))[0]["f"].tolist()
    [0.5, 1.5]
    """
    return lambda scores: jax.tree.map(lambda s: s / (jnp.mean(s) + eps), scores)


def standardize(eps: float = 1e-12) -> Callable[[Scores], Scores]:
    """A transform that subtracts the mean of each layer and axis and divides by the standard deviation.

    >>> import jax.numpy as jnp
    >>> from jaxprune import scorers
    >>> scorers.standardize()(({"f": jnp.array([1.0, 3.0])},))[0]["f"].tolist()
    [-1.0, 1.0]
    """
    return lambda scores: jax.tree.map(lambda s: (s - jnp.mean(s)) / (jnp.std(s) + eps), scores)
