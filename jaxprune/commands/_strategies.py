"""The strategies of `jaxprune search`: what they score, what candidates they make, what they compare with."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from jaxprune import _hosts, _narrow, allocate, budgets, folder, methods, models, pipeline, scorers
from jaxprune._progress import progress, table
from jaxprune._scores_file import read_scores, write_scores
from jaxprune.commands._common import flag, say
from jaxprune.models import LlamaConfig, PerLayer
from jaxprune.plan import Plan, select
from jaxprune.search import _loop, database, evolution, importance, points, refine, sizes
from jaxprune.search.fitness import gate_losses
from jaxprune.search.points import Point
from jaxprune.search.sizes import Window


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured, on what."""

    fitness: Annotated[str | None, flag("SRC", "other windows of the calibration text")] = None
    """Text that candidates are measured on; keep it apart from what you evaluate on."""
    fitness_samples: Annotated[int, flag("N")] = 32
    """Sequences of that text; the second half decides at the end whether the search or its baseline is taken."""
    generations: Annotated[int | None, flag("N", "the strategy's own")] = None
    """Of auto and evolution."""
    preset: Literal["small", "paper"] = "small"
    """Population and generations of evolution."""
    literal: bool = False
    """Evolution mutates masks as its paper prints it, which does nothing where less than 80 % is kept."""
    equal_widths: bool = False
    """Evolution leaves all layers equally wide and searches masks alone."""
    attention_units: Literal["groups", "pairs"] = "groups"
    """Evolution takes KV groups from an attention, or rotary pairs from its heads, as the paper does; no llama.cpp then."""
    trials: Annotated[int, flag("N")] = 50
    """Of adapruner."""
    at_once: Annotated[int, flag("N")] = 1
    """Candidates that a device evaluates together."""


class Task(NamedTuple):
    """What a strategy gets.

    Attributes:
      model: the dense model.
      settings: of the method that it starts from.
      constraints, window: what it may return.
      tokens, fitness, held_out: int32[n, t] to score, to search and to decide on.
      goal: a target, or None.
      effort: how much to measure.
      out: the folder of the search.
      record: what a checkpoint has to agree with.
    """

    model: folder.Model
    settings: pipeline.Settings
    constraints: allocate.Constraints
    window: Window
    tokens: np.ndarray
    fitness: np.ndarray
    held_out: np.ndarray
    goal: budgets.Target | None
    effort: Effort
    out: Path
    record: dict[str, Any]

    @property
    def cfg(self) -> LlamaConfig:
        """Of the dense model."""
        return self.model.cfg

    @property
    def microbatch(self) -> int:
        """Sequences that go through a layer at a time: it divides those of either text."""
        both = math.gcd(len(self.fitness), len(self.held_out))
        return pipeline.divisor((both, self.fitness.shape[1]), self.model.params)


class Outcome(NamedTuple):
    """What a strategy found.

    Attributes:
      dense: loss of the dense model on the text of the search.
      baseline, best: plans.
      held_out: their losses on text that the search has not seen.
      points: all candidates.
    """

    dense: float
    baseline: Plan
    best: Plan
    held_out: tuple[float, float]
    points: list[Point]


def search_auto(task: Task) -> Outcome:
    params, cfg, window = task.model.params, task.cfg, task.window
    scores = _scores(task, methods.find(methods.DEFAULT).scorer)
    recipe = _narrow.widths(_recipe(task, scores), cfg)
    db = database.build(params, cfg, scores, pipeline.batches(task.tokens, params), task.constraints, progress=progress)
    losses = database.losses_of(params, cfg, db, at_once=task.effort.at_once, microbatch=task.microbatch)

    def measure(candidates: Sequence[database.Levels]) -> np.ndarray:
        return losses(candidates, task.fitness)

    schedule = refine.Refinement()
    if task.effort.generations is not None:
        schedule = dataclasses.replace(schedule, generations=task.effort.generations)
    problem = refine.problem(cfg, db, measure, scores, window, task.constraints, schedule, recipe)
    found = _evolved(task, problem, schedule)
    others = refine.at_other_sizes(cfg, db, measure, scores, window, task.constraints, recipe)
    start, best = refine.start(cfg, db, window, recipe), found.best[0][1]
    whole = tuple({a: 0 for a in layer} for layer in db.counts)
    dense, (first, second) = measure([whole])[0], losses([start, best], task.held_out)
    baseline, chosen = (_exact(task, problem.plan(levels), scores) for levels in (start, best))
    return Outcome(float(dense), baseline, chosen, (float(first), float(second)), others + found.points)


def _exact(task: Task, plan: Plan, scores: PerLayer) -> Plan:
    """The plan with single multiples of channels less, or more, so that it has the asked size as nearly as they allow."""
    rng = np.random.default_rng(task.settings.seed)
    for window in (sizes.tight(task.cfg, task.window, task.constraints.multiple_of), task.window):
        found = sizes.fit(plan, task.cfg, window, task.constraints, rng, scores)
        if found is not None:
            return found
    return plan


def search_adapruner(task: Task) -> Outcome:
    from jaxprune.search.adapruner import adapruner

    kept, losses = _narrow.widths(_recipe(task, ()), task.cfg), _gate_losses(task)

    def fitness(plans: Sequence[Plan]) -> np.ndarray:
        return losses(plans, task.fitness)

    found = adapruner(
        task.model.params, task.cfg, task.tokens, fitness, lambda scores: select(scores, kept),
        study=task.out / "study.db", trials=task.effort.trials, seed=task.settings.seed, settings=task.record,
        microbatch=None, cost=lambda plan: sizes.cost_of(plan, task.cfg, task.window), on_trial=_told(task.window.unit),
    )  # fmt: skip
    baseline, best = found[0], min(found, key=lambda p: p.loss)
    assert baseline.plan is not None and best.plan is not None, "every trial keeps its plan"
    return _compared(task, losses, baseline.plan, best.plan, found)


def search_evolution(task: Task) -> Outcome:
    cfg, window, losses, constraints = task.cfg, task.window, _gate_losses(task), task.constraints
    pairs = task.effort.attention_units == "pairs"
    scores = _scores(task, lambda cfg, options: importance.obs_importance(cfg, task.model.params, pairs=pairs))
    recipe = _recipe(task, scores)
    if pairs:
        constraints = dataclasses.replace(constraints, units="hf")
        start = _alike(task, scores, constraints, recipe.decoder_parameters / cfg.decoder_parameters)
    else:
        start = select(scores, _narrow.widths(recipe, cfg))
    schedule = evolution.SMALL if task.effort.preset == "small" else evolution.Evolution()
    changed: dict[str, Any] = dict(literal=task.effort.literal)
    if task.effort.generations is not None:
        changed["generations"] = task.effort.generations
    if task.effort.equal_widths:
        changed |= dict(ratio_rate=0.0, first_ratio_rate=0.0, depth_rate=0.0)
        size = sizes.cost_of(start, cfg, window)
        window = window._replace(low=size, high=size)
    schedule = dataclasses.replace(schedule, **changed)
    limits = evolution.space(1 - recipe.decoder_parameters / cfg.decoder_parameters)
    problem = evolution.problem(cfg, start, lambda plans: losses(plans, task.fitness), window, constraints, schedule, limits)
    found = _evolved(task, problem, schedule)
    return _compared(task, losses, start, found.best[0][1], found.points)


def _alike(task: Task, scores: PerLayer, constraints: allocate.Constraints, part: float) -> Plan:
    """The same part of the units of every layer, on every axis that has scores, of an allowed size."""
    chosen = constraints.chosen(task.cfg)

    def width(axis: str, n: int, layer: int) -> int:
        step = constraints.step(axis)
        return max(round(part * n / step) * step, constraints.fewest(axis, n, layer)) if layer in chosen else n

    plan = select(scores, tuple({a: width(a, len(s), i) for a, s in layer.items()} for i, layer in enumerate(scores)))
    rng = np.random.default_rng(task.settings.seed)
    found = sizes.fit(plan, task.cfg, task.window, constraints, rng, scores)
    if found is None:
        raise ValueError(f"search: no widths have {task.window.high:.6g} {task.window.unit}; ask for another size")
    return found


def _evolved(task: Task, problem: _loop.Problem, schedule: evolution.Evolution | refine.Refinement) -> _loop.Found:
    """Runs the loop, or goes on with it, and shows the front after each generation."""

    def show(generation: int, found: _loop.Found) -> None:
        best = f"best loss {found.best[0][0]:.4f}, {len(found.points)} candidates"
        say(f"generation {generation} of {schedule.generations}: {best}")
        say(table(points.rows(points.front(found.points), task.window.unit)))

    return _loop.evolve(
        problem, generations=schedule.generations, keep=schedule.keep, seed=task.settings.seed, settings=task.record,
        checkpoint=task.out / "search.json", on_generation=show,
    )  # fmt: skip


def _gate_losses(task: Task) -> Callable[[Sequence[Plan], Any], np.ndarray]:
    return gate_losses(task.model.params, task.cfg, at_once=task.effort.at_once, microbatch=task.microbatch)


def _compared(task: Task, losses: Callable, baseline: Plan, best: Plan, found: list[Point]) -> Outcome:
    dense = losses([pipeline.identity(task.cfg, task.settings)], task.fitness)[0]
    first, second = losses([baseline, best], task.held_out)
    return Outcome(float(dense), baseline, best, (float(first), float(second)), found)


def _recipe(task: Task, scores: PerLayer) -> LlamaConfig:
    """The shape that the strategy's method would give."""
    if task.goal is not None:
        predicted = task.goal._replace(measure=None)
        return budgets.meet(_narrow.at_ratio(scores, task.cfg, task.settings), predicted, task.cfg).cfg
    budget = round(task.cfg.decoder_parameters * task.settings.ratio)
    return _narrow.shape(scores, task.cfg, budget, task.settings, task.cfg)


def _scores(task: Task, make: Any) -> PerLayer:
    """Scores of the file in the folder, or made and written there."""
    path = task.out / "scores.npz"
    if not _hosts.stands(path):
        batches = pipeline.batches(task.tokens, task.model.params)
        scorer = make(task.cfg, methods.Options(seed=task.settings.seed, microbatch=len(batches[0])))
        made = scorers.score(scorer, task.model.params, models.probes(task.cfg), progress(batches, "scoring"))
        _hosts.by_first(write_scores, path, made)
    return read_scores(path, len(task.cfg.layers))


def _told(unit: str) -> Callable[[int, Point], None]:
    every: list[Point] = []

    def tell(number: int, point: Point) -> None:
        every.append(point)
        say(f"{point.origin}: loss {point.loss:.4f}")
        if len(every) % 10 == 0:
            say(table(points.rows(points.front(every), unit)))

    return tell


STRATEGIES: dict[str, Callable[[Task], Outcome]] = dict(
    auto=search_auto, adapruner=search_adapruner, evolution=search_evolution
)
