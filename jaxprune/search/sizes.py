"""Which sizes a search may return, and how a candidate of another size is brought there."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxprune import surgery
from jaxprune._constraints import Constraints
from jaxprune.models import LayerDims, LlamaConfig, PerLayer, unit_costs
from jaxprune.plan import Plan

TRIES = 200


class Window(NamedTuple):
    """Sizes that are allowed.

    Attributes:
      cost: configuration -> size; it falls when units go.
      low, high: both included.
      unit: of the size.
    """

    cost: Callable[[LlamaConfig], float]
    low: float
    high: float
    unit: str = "decoder parameters"

    def holds(self, cost: float) -> bool:
        """Whether a size is allowed."""
        return self.low <= cost <= self.high


def of_ratio(cfg: LlamaConfig, ratio: float, multiple: int = 1, slack: float = 0.0025) -> Window:
    """At least this fraction of the attention and MLP matrices goes, and at most `slack` more, or one step of an MLP.

    Args:
      cfg: the dense model.
      ratio: fraction.
      multiple: channels in a step.
      slack: fraction.

    Raises:
      ValueError: the ratio is not between 0 and 1.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio: {ratio} given; allowed is between 0 and 1, both excluded")
    dense = cfg.decoder_parameters
    more = max(slack * dense, multiple * max(cost.get("f", 0) for cost in unit_costs(cfg)))
    most = round(dense * (1 - ratio))
    return Window(lambda small: float(small.decoder_parameters), most - more, most)


def tight(cfg: LlamaConfig, window: Window, multiple: int) -> Window:
    """The window, or less of it: less than a step of an MLP below its upper end."""
    narrow = [dims._replace(ff=max(dims.ff - multiple, 0)) for dims in cfg.layers]
    steps = [window.cost(cfg) - window.cost(_with(cfg, i, dims)) for i, dims in enumerate(narrow)]
    return window._replace(low=max(window.low, window.high - 0.999 * max(steps)))


def _with(cfg: LlamaConfig, layer: int, dims: LayerDims) -> LlamaConfig:
    return dataclasses.replace(cfg, layers=(*cfg.layers[:layer], dims, *cfg.layers[layer + 1 :]))


def cost_of(plan: Plan, cfg: LlamaConfig, window: Window) -> float:
    """The size of what a plan leaves."""
    return window.cost(surgery.pruned_config(cfg, plan))


def fit(
    plan: Plan,
    cfg: LlamaConfig,
    window: Window,
    constraints: Constraints,
    rng: np.random.Generator,
    scores: PerLayer | None = None,
) -> Plan | None:
    """Narrows or widens MLPs of random layers until the size is allowed; None if that cannot be done.

    Args:
      plan: a candidate of any size.
      cfg: the dense model.
      window: allowed sizes.
      constraints: which layers may change, by which multiples, and how narrow they may be.
      rng: chooses the layers and, without scores, the channels.
      scores: per layer, axis letter -> float32[units]: the lowest go first and the highest come back first.

    >>> import numpy as np
    >>> from jaxprune import allocate, models, plan
    >>> from jaxprune.search import sizes
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 2)
    >>> whole = plan.Plan(({"f": range(48)},) * 2, ({"f": 48},) * 2)
    >>> small = sizes.fit(whole, cfg, sizes.of_ratio(cfg, 0.25), allocate.Constraints(), np.random.default_rng(0))
    >>> sum(len(layer["f"]) for layer in small.keep) < 60
    True
    """
    step, layers = constraints.multiple_of, [i for i in constraints.chosen(cfg) if "f" in plan.keep[i]]
    for _ in range(TRIES):
        now = cost_of(plan, cfg, window)
        if window.holds(now):
            return plan
        if not layers or "f" not in constraints.units:
            return None
        i = int(rng.choice(layers))
        width, n, narrower = len(plan.keep[i]["f"]), plan.sizes[i]["f"], now > window.high
        room = (width - constraints.fewest("f", n, i) if narrower else n - width) // step
        if not width or room < 1:
            continue
        by = -step if narrower else step
        price = abs(now - cost_of(_resized(plan, i, width + by, rng, scores), cfg, window))
        missing = now - window.high if narrower else window.low - now
        moves = math.ceil(missing / price) if price > 0 else 1
        plan = _resized(plan, i, width + by * min(int(rng.integers(1, moves + 1)), room), rng, scores)
    return None


def _resized(plan: Plan, layer: int, width: int, rng: np.random.Generator, scores: PerLayer | None) -> Plan:
    score = None if scores is None else np.asarray(scores[layer]["f"])
    kept = resized(plan.keep[layer]["f"], plan.sizes[layer]["f"], width, rng, score)
    return Plan(tuple(k | {"f": kept} if i == layer else k for i, k in enumerate(plan.keep)), plan.sizes)


def resized(kept: np.ndarray, n: int, width: int, rng: np.random.Generator, scores: np.ndarray | None = None) -> np.ndarray:
    """Kept units of a sublayer at another width: some of those that were kept, or all of them and some others."""
    gone = np.setdiff1d(np.arange(n), kept)
    if scores is None:
        return rng.choice(kept, width, False) if width <= len(kept) else np.r_[kept, rng.choice(gone, width - len(kept), False)]
    if width <= len(kept):
        return kept[np.argsort(-scores[kept], kind="stable")[:width]]
    return np.r_[kept, gone[np.argsort(-scores[gone], kind="stable")[: width - len(kept)]]]
