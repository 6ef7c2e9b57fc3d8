"""Search for Efficient Large Language Models: evolution of masks, by gates."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxprune.allocate import Constraints
from jaxprune.models import LlamaConfig
from jaxprune.plan import Plan
from jaxprune.search._loop import Problem
from jaxprune.search.fitness import Fitness
from jaxprune.search.sizes import Window, cost_of, fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evolution:
    """The schedule of the search; the defaults are the paper's.

    Attributes:
      population: candidates of generation 0, mutations of the initial one.
      generations: after generation 0.
      keep: best candidates that the next generation comes from.
      mutations, crossovers, fresh: candidates of a generation: mutations and crossovers of the best, and mutations at the rates
        of generation 0.
      ratio_rate, mask_rate, depth_rate: probability that a sublayer's width, its mask, and the depth change.
      first_ratio_rate, first_mask_rate: the same in generation 0, whose depth does not change.
      overlap: alpha, of the kept units of a mask so many stay when it mutates.
      literal: mutate masks as the paper prints it: draw random masks until one shares `overlap` of all units with the old one,
        or `tries` failed; below a kept fraction of `overlap` that never succeeds.
      tries: eta.
    """

    population: int = 100
    generations: int = 50
    keep: int = 10
    mutations: int = 50
    crossovers: int = 30
    fresh: int = 20
    ratio_rate: float = 0.1
    mask_rate: float = 0.3
    depth_rate: float = 0.1
    first_ratio_rate: float = 0.3
    first_mask_rate: float = 0.6
    overlap: float = 0.8
    literal: bool = False
    tries: int = 1000

    def __post_init__(self):
        for name in ("population", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} given; it must be at least 1")
        for name in ("generations", "mutations", "crossovers", "fresh", "tries"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} given; it must be at least 0")
        for name in ("ratio_rate", "mask_rate", "depth_rate", "first_ratio_rate", "first_mask_rate", "overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} given; allowed is 0 to 1")


SMALL = Evolution(population=24, generations=10, keep=4, mutations=10, crossovers=6, fresh=4)  # for small machines


class Space(NamedTuple):
    """What fractions a search may keep.

    Attributes:
      attention, mlp: the least of a layer's units of the attention and MLP channels, in steps of 0.01 and 0.05.
      depth: the least of the layers.
    """

    attention: float
    mlp: float
    depth: float


def space(ratio: float) -> Space:
    """The paper's search space for LLaMA-7B, by the fraction of parameters to remove (table 1).

    It prints 0.3 as the least of an attention at 30 % removed, which is read as a misprint of 0.7.
    """
    table = [(0.1, Space(0.9, 0.6, 1.0)), (0.2, Space(0.8, 0.4, 1.0)), (0.3, Space(0.7, 0.2, 30 / 32))]
    return next((found for limit, found in table if ratio <= limit + 1e-9), Space(0.6, 0.1, 28 / 32))


def problem(
    cfg: LlamaConfig,
    start: Plan,
    fitness: Fitness,
    window: Window,
    constraints: Constraints,
    settings: Evolution,
    limits: Space,
) -> Problem:
    r"""Evolution of plans: masks over units of the attention and MLP channels, and layers that are gone.

    With the units `kf` those of the attention are KV groups; with `hf` they are rotary pairs of all heads of a layer, which is
    the paper's own unit, with the two dimensions of a pair tied.

    Candidates whose size is not allowed are brought to an allowed one, or dropped without being measured.

    Args:
      cfg: the dense model.
      start: where generation 0 begins: the units with the largest scores, as many in every layer.
      fitness: measures candidates.
      window: allowed sizes.
      constraints: which layers and units may go, by which multiples.
      settings: the schedule.
      limits: what fractions may be kept.

    Reference: Shen et al., `Search for Efficient Large Language Models <https://arxiv.org/abs/2409.17372>`_, 2024, sections 3.2
    and 3.3, algorithm 1. A mutated mask is built from `overlap` of the units that were kept (`literal` is the paper's rejection
    loop); a layer that goes is a random one (the released code keeps the first ones); crossover takes each layer from one of
    two parents (the paper does not say how); the window is reached by resizing MLPs (the paper drops candidates outside it).
    """

    def sized(plan: Plan | None, rng: np.random.Generator) -> list[Plan]:
        found = None if plan is None else fit(plan, cfg, window, constraints, rng)
        return [] if found is None else [found]

    def mutated(plan: Plan, rng: np.random.Generator, first: bool) -> list[Plan]:
        rates = (settings.first_ratio_rate, settings.first_mask_rate) if first else (settings.ratio_rate, settings.mask_rate)
        keep = [dict(layer) for layer in plan.keep]
        for i in constraints.chosen(cfg):
            for a in constraints.units:
                n = plan.sizes[i].get(a, 0)
                if a in keep[i] and len(keep[i][a]):
                    width = len(keep[i][a])
                    if rng.random() < rates[0]:
                        width = _width(a, n, i, constraints, limits, rng)
                    if width != len(keep[i][a]) or rng.random() < rates[1]:
                        keep[i][a] = mask_mutation(keep[i][a], n, width, rng, settings)
        if not first and rng.random() < settings.depth_rate:
            _change_depth(keep, start, cfg, constraints, limits, rng)
        return sized(Plan(tuple(keep), plan.sizes), rng)

    def crossed(a: Plan, b: Plan, rng: np.random.Generator) -> list[Plan]:
        keep = tuple(x if rng.random() < 0.5 else y for x, y in zip(a.keep, b.keep, strict=True))
        return sized(Plan(keep, a.sizes), rng)

    def vary(parents: Sequence[Plan], rng: np.random.Generator) -> list[Plan]:
        def one() -> Plan:
            return parents[int(rng.integers(len(parents)))]

        if not parents:
            made = [plan for _ in range(settings.population - 1) for plan in mutated(start, rng, True)]
            return [*sized(start, rng), *made]
        found = [plan for _ in range(settings.mutations) for plan in mutated(one(), rng, False)]
        found += [plan for _ in range(settings.crossovers) for plan in crossed(one(), one(), rng)]
        return found + [plan for _ in range(settings.fresh) for plan in mutated(one(), rng, True)]

    return Problem(
        losses=fitness,
        vary=vary,
        cost=lambda plan: cost_of(plan, cfg, window),
        plan=lambda plan: plan,
        encode=lambda plan: plan.to_json(),
        decode=Plan.from_json,
    )


def _width(axis: str, n: int, layer: int, constraints: Constraints, limits: Space, rng: np.random.Generator) -> int:
    """A random width in the space: KV groups one by one, pairs by 1 %, channels by 5 %, rounded to their multiples."""
    fewest = constraints.fewest(axis, n, layer)
    if axis == "h":
        return max(round(rng.integers(round(limits.attention / 0.01), 101) * 0.01 * n), fewest)
    if axis == "k":
        return constraints.groups(n, n - int(rng.integers(max(fewest, min(n, math.ceil(limits.attention * n - 1e-9))), n + 1)))
    fraction = rng.integers(round(limits.mlp / 0.05), 21) * 0.05
    return min(max(round(fraction * n / constraints.multiple_of) * constraints.multiple_of, fewest), n)


def mask_mutation(kept: np.ndarray, n: int, width: int, rng: np.random.Generator, settings: Evolution) -> np.ndarray:
    r"""Another mask of `width` of `n` units.

    At least :math:`\lceil \alpha |K| \rceil` of the kept units stay, as far as they fit; the others are drawn from those that
    were gone and the rest. With `literal`, random masks are drawn until :math:`|K \cap K'| \ge \alpha n`, and after `tries`
    failures the old mask stays, of whatever width.

    Args:
      kept: indices of the kept units.
      n: units that there are.
      width: units to keep.
      rng: draws.
      settings: `overlap`, `literal` and `tries`.

    Reference: Shen et al., `Search for Efficient Large Language Models <https://arxiv.org/abs/2409.17372>`_, 2024, algorithm 1,
    of which only `literal` is a copy.

    >>> import numpy as np
    >>> from jaxprune.search import evolution
    >>> rng, kept = np.random.default_rng(0), np.arange(50)
    >>> new = evolution.mask_mutation(kept, 100, 50, rng, evolution.Evolution())
    >>> len(new), len(np.intersect1d(kept, new)) >= 40
    (50, True)
    >>> same = evolution.mask_mutation(kept, 100, 50, rng, evolution.Evolution(literal=True))  # 50 cannot share 80
    >>> bool((same == kept).all())
    True
    """
    if settings.literal:
        for _ in range(settings.tries if width >= settings.overlap * n else 0):
            new = rng.choice(n, width, replace=False)
            if len(np.intersect1d(kept, new)) >= settings.overlap * n:
                return np.sort(new)
        return kept
    stay = rng.choice(kept, min(math.ceil(settings.overlap * len(kept)), width), replace=False)
    others = rng.choice(np.setdiff1d(np.arange(n), stay), width - len(stay), replace=False)
    return np.sort(np.concatenate([stay, others]))


def _change_depth(
    keep: list[dict], start: Plan, cfg: LlamaConfig, constraints: Constraints, limits: Space, rng: np.random.Generator
) -> None:
    """Takes a random layer away, or brings one back as it was at the start, within the space."""
    chosen = list(constraints.chosen(cfg))
    gone = [i for i in chosen if keep[i] and not any(len(x) for x in keep[i].values())]
    least = math.ceil(limits.depth * len(cfg.layers) - 1e-9)
    may_go = len(cfg.layers) - len(gone) > least and len(constraints.units) == 2
    if may_go and (not gone or rng.random() < 0.5):
        i = int(rng.choice([i for i in chosen if i not in gone]))
        keep[i] = {a: np.zeros(0, np.int64) for a in keep[i]}
    elif gone:
        i = int(rng.choice(gone))
        keep[i] = dict(start.keep[i])
