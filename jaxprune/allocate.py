"""Scores + budget + constraints -> widths: how many units each layer keeps.

Budgets are parameters of the attention and MLP matrices to remove, costs are parameters that go with one unit.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from jaxprune.models import LlamaConfig, PerLayer, unit_costs
from jaxprune.plan import Widths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraints:
    """What an allocation may do.

    Attributes:
      layers: layers that may be pruned, half-open; None is all.
      units: axis letters that may be pruned.
      multiple_of: MLP widths that change are multiples of this.
    """

    layers: tuple[int, int] | None = None
    units: str = "kf"
    multiple_of: int = 1

    def __post_init__(self):
        if self.multiple_of < 1:
            raise ValueError(f"multiple_of: {self.multiple_of} given; ask for at least 1")
        if not self.units or set(self.units) - set("kf"):
            raise ValueError(f"units: {self.units!r} given; allowed are k (KV groups), f (MLP channels) or both")

    def chosen(self, cfg: LlamaConfig) -> range:
        """The layers that may be pruned.

        Raises:
          ValueError: the range is empty or leaves the model.
        """
        n = len(cfg.layers)
        start, stop = self.layers or (0, n)
        if not 0 <= start < stop <= n:
            raise ValueError(
                f"layers: {start}:{stop} given; this model has layers 0:{n}; give a range inside it that is not empty"
            )
        return range(start, stop)

    def fewest(self, axis: str, have: int) -> int:
        """The least number of units that a layer with `have` of them keeps on an axis: a multiple, at least one."""
        return 1 if axis == "k" else min(self.multiple_of, have)


Allocator: TypeAlias = Callable[[PerLayer, LlamaConfig, int, Constraints], Widths]


def reachable(cfg: LlamaConfig, constraints: Constraints) -> int:
    """The most parameters that can be removed."""
    costs = unit_costs(cfg)
    return sum(
        costs[i][a] * (n - constraints.fewest(a, n))
        for i in constraints.chosen(cfg)
        for a, n in full_widths(cfg)[i].items()
        if a in constraints.units
    )


def full_widths(cfg: LlamaConfig) -> list[dict[str, int]]:
    """Units of the model, per layer and axis letter, `k` before `f`."""
    return [{a: cfg.sizes(dims)[a] for a in "kf" if cfg.sizes(dims)[a]} for dims in cfg.layers]


def _check(cfg: LlamaConfig, budget: int, constraints: Constraints) -> None:
    most = reachable(cfg, constraints)
    if budget > most:
        raise ValueError(
            f"budget: removing {budget / cfg.decoder_parameters:.1%} of the decoder given; with these layers, units and "
            f"multiples at most {most / cfg.decoder_parameters:.1%} can go; lower --ratio, widen --layers or prune more --units"
        )


def removed(cfg: LlamaConfig, widths: Widths) -> int:
    """Parameters of attention and MLP matrices that an allocation removes."""
    costs, full = unit_costs(cfg), full_widths(cfg)
    return sum(costs[i][a] * (full[i][a] - n) for i, layer in enumerate(widths) for a, n in layer.items())


def local(scores: PerLayer, cfg: LlamaConfig, budget: int, constraints: Constraints) -> Widths:
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
    _check(cfg, budget, constraints)
    widths, costs, chosen = full_widths(cfg), unit_costs(cfg), constraints.chosen(cfg)
    held = {a: sum(costs[i][a] * widths[i].get(a, 0) for i in chosen if a in costs[i]) for a in constraints.units}
    fraction = budget / sum(held.values())
    left = budget
    if "k" in constraints.units:
        for i in chosen:
            if n := widths[i].get("k"):
                # a KV group is too large a step to round up; alone it has to meet the budget as well as it can
                drop = int(fraction * n + 1e-9) if "f" in constraints.units else round(fraction * n)
                widths[i]["k"] = n - min(drop, n - 1)
                left -= costs[i]["k"] * (n - widths[i]["k"])
    if "f" in constraints.units:
        fraction = left / held["f"]
        step = constraints.multiple_of
        for i in chosen:
            if n := widths[i].get("f"):
                kept = round(n * (1 - fraction) / step) * step
                widths[i]["f"] = min(max(kept, constraints.fewest("f", n)), n)
    return tuple(widths)


def global_(scores: PerLayer, cfg: LlamaConfig, budget: int, constraints: Constraints) -> Widths:
    """Removes the units with the lowest scores wherever they are, until the budget is met.

    MLP channels of a layer go in blocks of `multiple_of`, scored by their mean. A unit that would overshoot by more than it
    helps is skipped. Every layer keeps at least one KV group and one block of channels.

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
    _check(cfg, budget, constraints)
    widths, costs = full_widths(cfg), unit_costs(cfg)
    items = []  # score, layer, axis, units
    for i in constraints.chosen(cfg):
        for a, n in widths[i].items():
            if a not in constraints.units:
                continue
            s, step = np.sort(np.asarray(scores[i][a], np.float64)), constraints.multiple_of if a == "f" else 1
            ends = range(n - (n - 1) // step * step, n - constraints.fewest(a, n) + 1, step)
            start = 0
            for end in ends:
                items.append((s[start:end].mean(), i, a, end - start))
                start = end
    left = budget
    for _, i, a, n in sorted(items):
        cost = costs[i][a] * n
        if abs(left - cost) < left:
            widths[i][a] -= n
            left -= cost
    return tuple(widths)


def whole_layers(scores: PerLayer, cfg: LlamaConfig, budget: int, constraints: Constraints) -> Widths:
    """Removes whole decoder layers, those whose units' scores have the lowest sum.

    Args:
      scores: per layer, axis letter -> float32[units].
      cfg: the model.
      budget: parameters to remove; met as nearly as whole layers allow.
      constraints: which layers may go.

    Raises:
      ValueError: the budget would remove every layer that may go.

    >>> import numpy as np
    >>> from jaxprune import allocate, models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(1, 1, 2),) * 2)
    >>> scores = ({"k": np.ones(1), "f": np.ones(2)}, {"k": np.zeros(1), "f": np.ones(2)})
    >>> allocate.whole_layers(scores, cfg, cfg.decoder_parameters // 2, allocate.Constraints())
    ({'k': 1, 'f': 2}, {'k': 0, 'f': 0})
    """
    widths, chosen, costs = full_widths(cfg), constraints.chosen(cfg), unit_costs(cfg)
    totals = {i: sum(float(np.sum(x)) for x in scores[i].values()) for i in chosen if widths[i]}
    left = budget
    for i in sorted(totals, key=lambda i: (totals[i], i)):
        cost = sum(costs[i][a] * n for a, n in widths[i].items())
        if abs(left - cost) < left:
            widths[i] = dict.fromkeys(widths[i], 0)
            left -= cost
    if not any(n for layer in widths for n in layer.values()):
        raise ValueError(f"budget: removing {budget} parameters given, which is every layer; lower --ratio")
    return tuple(widths)


def llm_pruner(ratio: float) -> Allocator:
    """LLM-Pruner's own counting: `ratio` of the groups of each chosen layer, whatever parameters that removes.

    The kept channels are truncated, heads are rounded down to whole ones, and the budget is not read.

    Args:
      ratio: fraction of KV groups and of MLP channels, in (0, 1).

    Raises:
      ValueError: ratio outside (0, 1).

    Reference: Ma et al., `LLM-Pruner <https://arxiv.org/abs/2305.11627>`_, 2023, as its released code counts. Where that code
    stops with an error (fewer channels than one head), no head is removed.

    >>> from jaxprune import allocate, models
    >>> cfg = models.LlamaConfig(vocab=32000, d=4096, head_dim=128, layers=(models.LayerDims(32, 1, 11008),) * 32)
    >>> widths = allocate.llm_pruner(0.25)((), cfg, 0, allocate.Constraints(layers=(4, 30)))
    >>> widths[4], cfg.decoder_parameters - allocate.removed(cfg, widths)
    ({'k': 24, 'f': 8256}, 5160566784)
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio: {ratio} given; allowed is between 0 and 1, both excluded")

    def allocate(scores: PerLayer, cfg: LlamaConfig, budget: int, constraints: Constraints) -> Widths:
        del scores, budget
        widths, h = full_widths(cfg), cfg.head_dim
        for i in constraints.chosen(cfg):
            for a, n in widths[i].items():
                size = h if a == "k" else 1
                drop = (n * size - int(n * size * (1 - ratio))) // size
                if a in constraints.units and drop < n:
                    widths[i][a] = n - drop
        return tuple(widths)

    return allocate
