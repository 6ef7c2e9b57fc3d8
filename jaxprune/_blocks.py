"""Blocks of units in the order in which they go, and what a budget affords of them."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

from jaxprune._constraints import Constraints
from jaxprune.models import Config, PerLayer

T = TypeVar("T")


def blocks(
    scores: PerLayer, widths: list[dict[str, int]], cfg: Config, constraints: Constraints, units: str
) -> list[tuple[int, str, int]]:
    """Layer, axis letter and number of units of each block that may go, the lowest mean score first.

    A block is as many KV groups or channels as lead to the next multiple; the units of a layer go in the order of their
    scores, and what the layer has to keep is in no block.

    Args:
      scores: per layer, axis letter -> float32[units].
      widths: units that there are.
      cfg: the model.
      constraints: which layers; multiples and floors.
      units: axis letters.
    """
    found = []
    for i in constraints.chosen(cfg):
        for a, n in widths[i].items():
            if a not in units:
                continue
            s, step = np.sort(np.asarray(scores[i][a], np.float64)), constraints.step(a)
            start = 0
            for end in range(n - (n - 1) // step * step, n - constraints.fewest(a, n, i) + 1, step):
                found.append((s[start:end].mean(), i, a, end - start))
                start = end
    return [(i, a, n) for _, i, a, n in sorted(found)]


def spend(budget: int, priced: Iterable[tuple[int, T]]) -> Iterator[T]:
    """Yields, in the given order, what brings the rest of the budget nearer to nothing.

    Args:
      budget: to spend.
      priced: pairs of price and thing.

    >>> from jaxprune._blocks import spend
    >>> list(spend(5, [(3, "a"), (9, "b"), (1, "c")]))
    ['a', 'c']
    """
    for price, thing in priced:
        if abs(budget - price) < budget:
            budget -= price
            yield thing
