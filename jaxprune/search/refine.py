"""Our search over widths: the knapsack of the recipe, then exchanges of width between sublayers that lower the loss."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from jaxprune import allocate
from jaxprune._constraints import Constraints
from jaxprune._curves import lagrangian
from jaxprune.models import LlamaConfig, PerLayer
from jaxprune.plan import Widths
from jaxprune.search import database
from jaxprune.search._loop import Problem
from jaxprune.search.database import Database, Levels
from jaxprune.search.points import Point
from jaxprune.search.sizes import Window

Measure: TypeAlias = Callable[[Sequence[Levels]], np.ndarray]
POWERS, ATTENTION = (0.7, 0.85, 1.0), (1.0, 1.5)  # of the knapsacks that generation 0 is made of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refinement:
    """The schedule of the search.

    Attributes:
      generations: after generation 0.
      offspring: candidates of a generation.
      keep: best candidates that the next generation comes from.
      exchanges: at most so many sublayers are narrowed, and as many widened, in one candidate.
    """

    generations: int = 10
    offspring: int = 8
    keep: int = 2
    exchanges: int = 3

    def __post_init__(self):
        for name, least in dict(generations=0, offspring=1, keep=1, exchanges=1).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} given; it must be at least {least}")


def problem(
    cfg: LlamaConfig,
    db: Database,
    measure: Measure,
    curves: PerLayer,
    window: Window,
    constraints: Constraints,
    settings: Refinement,
    recipe: Widths,
) -> Problem:
    r"""Evolution of widths: which units go at each width, and how the others make up for it, is fixed in the database.

    Generation 0 is the recipe's allocation and the knapsacks of several powers and factors (`allocate.lagrangian`). A child
    narrows a few sublayers of its parent by a level and widens others until the size is allowed again.

    Args:
      cfg: the dense model.
      db: the sublayers at every width.
      measure: losses of candidates, such as those of `database.losses_of` on a text.
      curves: per layer, axis letter -> float32[units], sorted losses of each width, as the scorer of the recipe gives them.
      window: allowed sizes.
      constraints: which layers and units may go.
      settings: the schedule.
      recipe: widths that the search has to beat.

    Reference: level switches over a database of compressed layers are of Sieberling et al., `EvoPress
    <https://arxiv.org/abs/2410.14649>`_, 2024, section 3. Here the levels of a sublayer are widths, exchanges keep a size that
    any cost may define, all candidates are measured on the same tokens, and the knapsack comes first.
    """
    movable, allowed = movable_in(db), widened(db, cfg, window)

    def cost(levels: Levels) -> float:
        return window.cost(config(db, cfg, levels))

    def child(parent: Levels, rng: np.random.Generator) -> Levels | None:
        levels = parent
        for by in (1, -1):
            for _ in range(int(rng.integers(1, settings.exchanges + 1))):
                levels = moved(db, levels, movable[int(rng.integers(len(movable)))], by)
        return sized(db, cfg, allowed, levels, rng)

    def vary(parents: Sequence[Levels], rng: np.random.Generator) -> list[Levels]:
        if parents:
            made = [child(parents[int(rng.integers(len(parents)))], rng) for _ in range(settings.offspring)]
        else:
            budget = cfg.decoder_parameters - config(db, cfg, nearest(db, recipe)).decoder_parameters
            widths = [lagrangian(p, a)(curves, cfg, budget, constraints) for p in POWERS for a in ATTENTION]
            made = [start(cfg, db, window, recipe), *(sized(db, cfg, allowed, nearest(db, w), rng) for w in widths)]
        return [levels for levels in made if levels is not None]

    return Problem(
        losses=measure,
        vary=vary,
        cost=cost,
        plan=lambda levels: database.plan(db, levels),
        encode=lambda levels: [{a: int(j) for a, j in layer.items()} for layer in levels],
        decode=tuple,
    )


def nearest(db: Database, widths: Widths) -> Levels:
    """The levels whose widths come nearest to given ones."""
    return tuple(
        {a: int(np.argmin(np.abs(counts - layer.get(a, counts[0])))) for a, counts in at.items()}
        for layer, at in zip(widths, db.counts, strict=True)
    )


def config(db: Database, cfg: LlamaConfig, levels: Levels) -> LlamaConfig:
    """The configuration of a candidate."""
    return cfg.with_widths(database.widths(db, levels))


def movable_in(db: Database) -> list[tuple[int, str]]:
    """Layer and axis letter of the sublayers that have more than one level."""
    return [(i, a) for i, layer in enumerate(db.counts) for a, counts in layer.items() if len(counts) > 1]


def moved(db: Database, levels: Levels, at: tuple[int, str], by: int) -> Levels:
    """A sublayer goes `by` levels down, or as it was where there is no such level."""
    i, a = at
    level = levels[i][a] + by
    if not 0 <= level < len(db.counts[i][a]):
        return levels
    return tuple(layer | {a: level} if j == i else layer for j, layer in enumerate(levels))


def sized(db: Database, cfg: LlamaConfig, allowed: Window, levels: Levels, rng: np.random.Generator) -> Levels | None:
    """Single steps of random sublayers until the size is allowed; None where they do not lead there."""
    movable = movable_in(db)
    for _ in range(20 * len(movable)):
        now = allowed.cost(config(db, cfg, levels))
        if allowed.holds(now):
            return levels
        levels = moved(db, levels, movable[int(rng.integers(len(movable)))], 1 if now > allowed.high else -1)
    return None


def start(cfg: LlamaConfig, db: Database, window: Window, recipe: Widths) -> Levels:
    """The recipe's widths as levels of an allowed size.

    Raises:
      ValueError: there are none.
    """
    found = sized(db, cfg, widened(db, cfg, window), nearest(db, recipe), np.random.default_rng(0))
    if found is None:
        raise ValueError(f"search: no widths have {window.low:.6g} to {window.high:.6g} {window.unit}; ask for another size")
    return found


def widened(db: Database, cfg: LlamaConfig, window: Window) -> Window:
    """The window, at least as wide as a step of one level of an MLP, which `sizes.fit` then narrows."""
    levels: Levels = tuple({a: 0 for a in layer} for layer in db.counts)
    dense = window.cost(cfg)
    steps = [dense - window.cost(config(db, cfg, moved(db, levels, at, 1))) for at in movable_in(db) if at[1] == "f"]
    return window._replace(low=min(window.low, window.high - max(steps, default=0.0)))


def at_other_sizes(
    cfg: LlamaConfig,
    db: Database,
    measure: Measure,
    curves: PerLayer,
    window: Window,
    constraints: Constraints,
    recipe: Widths,
) -> list[Point]:
    """The knapsack at other sizes than the one that is searched, measured alike."""
    removed, most = allocate.removed(cfg, recipe), allocate.reachable(cfg, constraints)
    found = []
    for part in (0.5, 0.75, 1.25, 1.5):
        if part * removed <= most:
            levels = nearest(db, lagrangian(1.0, ATTENTION[-1])(curves, cfg, round(part * removed), constraints))
            loss = float(measure([levels])[0])
            found.append(Point(loss, window.cost(config(db, cfg, levels)), database.plan(db, levels), "knapsack, another size"))
    return found
