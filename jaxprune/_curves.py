"""The knapsack of layers: widths that lose least in sum, when each sublayer has a curve of loss against width."""

import dataclasses

import numpy as np

from jaxprune._constraints import Constraints, check, full_widths
from jaxprune.models import LlamaConfig, PerLayer, unit_costs
from jaxprune.plan import Widths


@dataclasses.dataclass
class Item:
    """A sublayer or a layer: what it may lose, in ascending order, what that costs, and which of these is chosen."""

    layer: int
    axis: str
    counts: np.ndarray
    losses: np.ndarray
    parameters: np.ndarray
    chosen: int = 0


def lagrangian(power: float = 1.0, attention: float = 1.0):
    r"""Minimises the sum of the losses of all sublayers for the budget, by bisection on the price of a parameter.

    Scores are read as curves: the n-th smallest score of a sublayer is what removing its n cheapest units loses in all, as
    `kronecker.kronecker_obs` and `sensitivity.curves` give it.

    .. math:: \min_n \sum_s \ell_s(n_s)^p \quad \text{such that} \quad \sum_s c_s n_s \ge B

    Args:
      power: p; below 1 it spreads the loss unevenly, over fewer sublayers.
      attention: factor on the losses of attentions.

    Returns:
      An allocator. It meets the budget to within one step of one sublayer.

    Raises:
      ValueError: a power or factor that is not positive.

    Reference: Shoham and Gersho, `Efficient bit allocation for an arbitrary set of quantizers
    <https://doi.org/10.1109/29.90373>`_, 1988, section II.

    >>> import numpy as np
    >>> from jaxprune import allocate, models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(1, 1, 4),) * 2)
    >>> curves = tuple({"k": np.ones(1), "f": np.cumsum(np.arange(1.0, 5.0)) * (i + 1)} for i in range(2))
    >>> allocate.lagrangian()(curves, cfg, 3 * 96, allocate.Constraints())
    ({'k': 1, 'f': 2}, {'k': 1, 'f': 3})
    """
    if power <= 0 or attention <= 0:
        raise ValueError(f"lagrangian: power {power} and attention {attention} given; both must be positive")

    def allocate(scores: PerLayer, cfg: LlamaConfig, budget: int, constraints: Constraints) -> Widths:
        check(cfg, budget, constraints)
        widths, costs, items = full_widths(cfg), unit_costs(cfg), []
        for i in constraints.chosen(cfg):
            for a, n in widths[i].items():
                if a in constraints.units:
                    curve = np.concatenate([[0.0], np.sort(np.asarray(scores[i][a], np.float64))]) ** power
                    step, most = constraints.step(a), n - constraints.fewest(a, n, i)
                    counts = np.concatenate([[0], np.arange(most % step or step, most + 1, step)]) if most else np.zeros(1, int)
                    losses = curve[counts] * (attention if a == "k" else 1.0)
                    items.append(Item(i, a, counts, losses, counts * float(costs[i][a])))
        choose(items, budget)
        for item in items:
            widths[item.layer][item.axis] -= int(item.counts[item.chosen])
        return tuple(widths)

    return allocate


def choose(items: list[Item], budget: int | float) -> None:
    """Chooses in all items so that the parameters that go are the budget, or near it, and the losses are least in sum."""
    low, high = 0.0, max(item.losses.max() for item in items)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _at(items, middle) < budget else (low, middle)
    _fill(items, budget - _at(items, low))


def _at(items: list[Item], price: float) -> float:
    """Takes what is best at a price of one parameter; returns the parameters that go."""
    for item in items:
        item.chosen = int(np.argmin(item.losses - price * item.parameters))
    return sum(item.parameters[item.chosen] for item in items)


def _fill(items: list[Item], left: float) -> None:
    """Removes more: the cheapest that fits, again and again; in the end one step too many, if that is nearer to the budget."""
    while left > 0:
        steps = [(item, j, item.parameters[j] - item.parameters[item.chosen]) for item in items for j in _ahead(item)]
        fitting = [(item, j, more) for item, j, more in steps if more <= left]
        if fitting:
            item, j, more = min(fitting, key=lambda step: _price(*step))
        else:
            nearest = min(steps, key=lambda step: abs(left - step[2]), default=None)
            if nearest is None or abs(left - nearest[2]) >= left:
                return
            item, j, more = nearest
        item.chosen, left = j, left - more


def _ahead(item: Item) -> range:
    return range(item.chosen + 1, len(item.counts))


def _price(item: Item, j: int, more: float) -> float:
    return (item.losses[j] - item.losses[item.chosen]) / more
