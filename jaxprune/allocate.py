"""Scores + budget + constraints -> widths: how many units each layer keeps.

Budgets are parameters of the attention and MLP matrices to remove, costs are parameters that go with one unit.
"""

from collections.abc import Callable
from typing import TypeAlias

from jaxprune._blocks import blocks, spend
from jaxprune._constraints import CHANNELS, Constraints, check, full_widths, reachable, removed
from jaxprune._curves import lagrangian
from jaxprune._rules import depth, gamma, llm_pruner, sublayers, whole_layers
from jaxprune.models import Config, PerLayer, unit_costs
from jaxprune.plan import Widths

__all__ = [
    "Allocator", "Constraints", "depth", "full_widths", "gamma", "global_", "lagrangian", "llm_pruner", "local", "reachable",
    "removed", "sublayers", "whole_layers",
]  # fmt: skip

Allocator: TypeAlias = Callable[[PerLayer, Config, int, Constraints], Widths]


def local(scores: PerLayer, cfg: Config, budget: int, constraints: Constraints) -> Widths:
    """The same fraction in every chosen layer: KV groups rounded down, MLP channels make up the rest.

    Args:
      scores: not read; layers are treated alike.
      cfg: the model.
      budget: parameters to remove.
      constraints: which layers and units; multiples.

    Returns:
      Widths whose removed parameters are as near to the budget as equal layers allow.

    Raises:
      ValueError: the budget is more than these layers and units hold.

    Reference: Ma et al., `LLM-Pruner <https://arxiv.org/abs/2305.11627>`_, 2023, local ranking; there both fractions are the
    same and the removed parameters follow, here the budget is met.

    >>> from jaxprune import allocate, models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(4, 1, 48),) * 2)
    >>> allocate.local((), cfg, cfg.decoder_parameters // 2, allocate.Constraints(multiple_of=8))
    ({'k': 2, 'f': 24}, {'k': 2, 'f': 24})
    """
    del scores
    check(cfg, budget, constraints)
    widths, costs, chosen = full_widths(cfg), unit_costs(cfg), constraints.chosen(cfg)
    held = {a: sum(costs[i][a] * widths[i].get(a, 0) for i in chosen if a in costs[i]) for a in constraints.units}
    fraction = budget / sum(held.values())
    left = budget
    if "k" in constraints.units:
        for i in chosen:
            if n := widths[i].get("k"):
                # a KV group is too large a step to round up; alone it has to meet the budget as well as it can
                drop = int(fraction * n + 1e-9) if "f" in constraints.units else round(fraction * n)
                widths[i]["k"] = constraints.groups(n, drop)
                left -= costs[i]["k"] * (n - widths[i]["k"])
    for a in set(constraints.units) & set(CHANNELS):
        fraction = left / held[a]
        step = constraints.multiple_of
        for i in chosen:
            if n := widths[i].get(a):
                kept = round(n * (1 - fraction) / step) * step
                widths[i][a] = min(max(kept, constraints.fewest(a, n, i)), n)
    return tuple(widths)


def global_(scores: PerLayer, cfg: Config, budget: int, constraints: Constraints) -> Widths:
    """Removes the units with the lowest scores wherever they are, until the budget is met.

    MLP channels of a layer go in blocks of `multiple_of`, scored by their mean. A unit that would overshoot by more than it
    helps is skipped. Every layer keeps at least one KV group (or `kv_multiple_of`) and one block of channels.

    Args:
      scores: per layer, axis letter -> float32[units], on one scale.
      cfg: the model.
      budget: parameters to remove.
      constraints: which layers and units; multiples.

    Raises:
      ValueError: the budget is more than these layers and units hold.

    Reference: Ma et al., `LLM-Pruner <https://arxiv.org/abs/2305.11627>`_, 2023, global ranking; there the number of units is
    the budget, here their parameters are.

    >>> import numpy as np
    >>> from jaxprune import allocate, models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 1, 4),) * 2)
    >>> scores = tuple({"k": np.array([9.0, 9]), "f": np.arange(4.0) + 4 * i} for i in range(2))
    >>> allocate.global_(scores, cfg, 3 * 96, allocate.Constraints())
    ({'k': 2, 'f': 1}, {'k': 2, 'f': 4})
    """
    check(cfg, budget, constraints)
    widths, costs = full_widths(cfg), unit_costs(cfg)
    lowest = blocks(scores, widths, cfg, constraints, constraints.units)
    for i, a, n in spend(budget, ((costs[i][a] * n, (i, a, n)) for i, a, n in lowest)):
        widths[i][a] -= n
    return tuple(widths)
