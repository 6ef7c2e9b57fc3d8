"""What AdaPruner scores by: Taylor statistics of calibration windows, none computed twice, and blends of them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxprune import scorers
from jaxprune.models import LlamaConfig, Params, PerLayer, loss_fn, probes

Subset: TypeAlias = tuple[int, ...]  # windows
Statistics: TypeAlias = Callable[[str, Subset], PerLayer]

ADDITIVE = ("sum", "square")
GRADIENT = dict(abs="param_first", mix="param_mix")  # kind -> the scorer that reads it
ORDERS = ("first", "second", "mix", "blend")


class Metric(NamedTuple):
    """A point of the space of metrics.

    Attributes:
      order: of the Taylor expansion: `first`, `second`, `mix` (LLM-Pruner's difference of both) or `blend`.
      alpha: of a blend, the weight of the second order.
      beta: 0 takes absolute values of elements, 1 of their sum over a channel; between them both count. Second-order terms
        are not negative, so it does not matter to them.
      aggregate: over the tensors of a unit, see `scorers.aggregate`.
    """

    order: str = "first"
    alpha: float = 0.0
    beta: float = 0.0
    aggregate: str = "sum"


LLM_PRUNER = dict(
    param_first=Metric("first"), param_second=Metric("second"), param_mix=Metric("mix"), vectorize=Metric("first", beta=1.0)
)


def statistics(params: Params, cfg: LlamaConfig, pool: Any, *, microbatch: int | None = None) -> Statistics:
    """A function of a kind of tap and a subset of the pool: the statistic that the scorer of that kind has of the subset.

    `sum` and `square` add up over windows. They take one backward pass for each window that any subset has, and stay on the
    host, [2, channels] a window. `abs` and `mix` take an absolute value after the sum: one backward pass of each for every
    subset.

    Args:
      params, cfg: the model.
      pool: int32[n, t], the windows that subsets are indices of.
      microbatch: sequences that go through a layer at a time; it divides the subsets. None is all of them.

    >>> import jax
    >>> from jaxprune import models
    >>> from jaxprune.search import _metrics
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> params, pool = models.init(jax.random.key(0), cfg), jax.numpy.arange(24).reshape(4, 6)
    >>> _metrics.statistics(params, cfg, pool)("sum", (0, 2))[0]["f"]["down"].shape
    (48,)
    """
    pool, templates = np.asarray(pool), probes(cfg)
    unravel = ravel_pytree(templates["taps"])[1]
    window, updates = _programs(cfg, microbatch)

    @functools.cache
    def of_window(i: int) -> np.ndarray:
        return np.asarray(window(params, pool[i : i + 1]))

    @functools.cache
    def gradient(kind: str, subset: Subset) -> PerLayer:
        start = scorers.taylor(loss_fn(cfg), GRADIENT[kind]).init(templates)
        return jax.device_get(updates[kind](start, params, templates, pool[list(subset)]).value())

    def of(kind: str, subset: Subset) -> PerLayer:
        if kind in GRADIENT:
            return gradient(kind, subset)
        row = ADDITIVE.index(kind)
        total = sum(of_window(i)[row].astype(np.float64) for i in subset) / len(subset)
        return unravel(jnp.asarray(total, jnp.float32))

    return of


@functools.lru_cache(maxsize=2)  # compiled once, however many searches
def _programs(cfg: LlamaConfig, microbatch: int | None) -> tuple[Callable, dict[str, Callable]]:
    of_one, of_many = loss_fn(cfg), loss_fn(cfg, microbatch=microbatch)

    def window(params, tokens):
        taps = dict.fromkeys(ADDITIVE, probes(cfg)["taps"])
        grads = jax.grad(lambda taps: of_one(params, taps, tokens).sum())(taps)
        return jnp.stack([ravel_pytree(grads[kind])[0] for kind in ADDITIVE])

    return jax.jit(window), {kind: jax.jit(scorers.taylor(of_many, name).update) for kind, name in GRADIENT.items()}


def score(of: Callable[[str], PerLayer], metric: Metric) -> PerLayer:
    """Scores by a metric.

    Args:
      of: kind of tap -> statistic of a subset, see `statistics`.
      metric: a point of the space.

    Returns:
      Per layer, axis letter -> float32[units].

    Raises:
      ValueError: unknown order or aggregation.
    """

    def reduced(f: Callable[..., jax.Array], *kinds: str) -> PerLayer:
        return scorers.aggregate(jax.tree.map(f, *map(of, kinds)), metric.aggregate)

    def first() -> PerLayer:
        return _between(lambda: reduced(jnp.asarray, "abs"), lambda: reduced(jnp.abs, "sum"), metric.beta)

    def second() -> PerLayer:
        return reduced(jnp.asarray, "square")

    def mix() -> PerLayer:
        channels = functools.partial(reduced, lambda g, g2: jnp.abs(g - 0.5 * g2), "sum", "square")
        return _between(lambda: reduced(jnp.asarray, "mix"), channels, metric.beta)

    terms = dict(first=first, second=second, mix=mix, blend=lambda: _between(first, second, metric.alpha))
    if metric.order not in terms:
        raise ValueError(f"order: {metric.order!r} given; allowed are {', '.join(ORDERS)}")
    return terms[metric.order]()


def _between(a: Callable[[], PerLayer], b: Callable[[], PerLayer], weight: float) -> PerLayer:
    """Both, each divided by its mean over a layer and axis; at weight 0 the first as it is, at 1 the second."""
    if weight in (0, 1):
        return b() if weight else a()
    return jax.tree.map(lambda x, y: (1 - weight) * _mean_one(x) + weight * _mean_one(y), a(), b())


def _mean_one(x: jax.Array) -> jax.Array:
    """Products of small numbers are far below the epsilon of `scorers.normalize`."""
    mean = jnp.mean(x)
    return x / jnp.where(mean > 0, mean, 1)
