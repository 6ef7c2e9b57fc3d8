"""`jaxprune search`: which units to remove, found by measuring many candidates."""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from jaxprune import _narrow, allocate, budgets, data, folder, methods, models, pipeline, scorers, surgery
from jaxprune._constraints import check
from jaxprune._files import atomic_bytes, atomic_text
from jaxprune._progress import progress, table
from jaxprune.commands import _budget
from jaxprune.commands._calibration import Calibration, draw
from jaxprune.commands._common import ModelName, Output, flag, layer_range, say, stage
from jaxprune.commands._stages import opened
from jaxprune.models import LlamaConfig, PerLayer
from jaxprune.plan import Plan, select
from jaxprune.search import _loop, database, evolution, importance, points, refine, sizes
from jaxprune.search.fitness import Fitness, gate_fitness
from jaxprune.search.points import Point
from jaxprune.search.sizes import Window

METHODS = dict(auto=methods.DEFAULT, adapruner="taylor", evolution="taylor")  # whose settings a strategy starts from


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
    """Evolution mutates masks as its paper prints it, which does nothing where less than 80 %% is kept."""
    equal_widths: bool = False
    """Evolution leaves all layers equally wide and searches masks alone."""
    trials: Annotated[int, flag("N")] = 50
    """Of adapruner."""
    at_once: Annotated[int, flag("N")] = 1
    """Candidates that a device evaluates together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What shapes may come out."""

    layers: Annotated[str | None, flag("A:B", "all layers")] = None
    """A:B, prune only layers A to B-1."""
    protect_first: Annotated[int, flag("N")] = 0
    """Leave the first N layers alone."""
    protect_last: Annotated[int, flag("N")] = 0
    """Leave the last N layers alone."""
    multiple_of: Annotated[int, flag("N")] = 8
    """MLP widths are multiples of this, e.g. of what a mesh axis divides."""
    min_kept: Annotated[float | None, flag("F", "the method's own")] = None
    """Every MLP keeps at least this fraction of its channels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """Search for the units to remove. Started again, it goes on where it stopped; `jaxprune prune --plan` cuts the result.

    auto: our recipe's allocation, then exchanges of width between layers, measured on a database of compressed layers.
    adapruner: calibration subset and importance metric by Bayesian optimisation. evolution: masks, from the paper Search for
    Efficient LLMs. Example: jaxprune search smollm2 --out found --ratio 0.2
    """

    model: ModelName
    out: Annotated[Path, flag("DIR")]
    """Folder for plan.json, pareto.json, pareto.png and what the search needs to go on."""
    strategy: Literal["auto", "adapruner", "evolution"] = "auto"
    """How candidates are made."""
    ratio: Annotated[float | None, flag("R", "0.2, unless a target is given")] = None
    """Fraction of the parameters of all attention and MLP matrices to remove."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""
    overwrite: bool = False
    """Begin anew in a folder that holds another search."""
    budget: _budget.Budget = _budget.Budget()
    calibration: Calibration = Calibration()
    effort: Effort = Effort()
    limits: Limits = Limits()
    output: Output = Output()

    def settings(self) -> pipeline.Settings:
        """The flags as those of the method that the strategy starts from.

        Raises:
          ValueError: they cannot be used.
        """
        settings = pipeline.Settings(
            method=METHODS[self.strategy],
            ratio=pipeline.Settings.ratio if self.ratio is None else self.ratio,
            layers=layer_range(self.limits.layers),
            protect_first=self.limits.protect_first,
            protect_last=self.limits.protect_last,
            multiple_of=self.limits.multiple_of,
            min_kept=self.limits.min_kept,
            seed=self.calibration.seed,
        )
        _budget.check(self.budget, settings, ratio=self.ratio)
        for name, least in dict(fitness_samples=2, trials=1, at_once=1).items():
            if (value := getattr(self.effort, name)) < least:
                raise ValueError(f"{name}: {value} given; it must be at least {least}")
        if self.effort.generations is not None and self.effort.generations < 0:
            raise ValueError(f"generations: {self.effort.generations} given; it must be at least 0")
        if self.effort.equal_widths and self.strategy != "evolution":
            raise ValueError(
                f"equal_widths: {self.strategy} chooses widths; use --strategy evolution, or prune --max-distinct 1"
            )
        if self.calibration.calibration == "self" or self.calibration.candidates > 1:
            raise ValueError("calibration: self and --candidates are not for a search; name a text")
        return settings


class Task(NamedTuple):
    """What a strategy gets: the model, what it may return, and tokens to score, to search and to decide on."""

    model: folder.Model
    settings: pipeline.Settings
    constraints: allocate.Constraints
    window: Window
    tokens: np.ndarray
    fitness: np.ndarray
    held_out: np.ndarray
    args: Search
    goal: budgets.Target | None = None

    @property
    def cfg(self) -> LlamaConfig:
        """Of the dense model."""
        return self.model.cfg

    @property
    def record(self) -> dict[str, Any]:
        """What a checkpoint has to agree with."""
        given = dataclasses.asdict(self.args)
        return {k: str(v) for k, v in given.items() if k not in ("out", "overwrite", "output")}


class Outcome(NamedTuple):
    """Two plans, their losses on text that the search has not seen, and all points."""

    baseline: Plan
    best: Plan
    held_out: tuple[float, float]
    points: list[Point]


def run(args: Search) -> dict[str, Any]:
    """Searches; returns the table of what was found."""
    settings, seconds = args.settings(), dict[str, float]()
    given = {k: v for k, v in dataclasses.asdict(args).items() if k not in ("output", "overwrite", "out")}
    with opened(args.out, given, overwrite=args.overwrite):
        with stage("loading", seconds):
            model = folder.load(args.model, args.dtype, needs_tokenizer=not data.is_token_file(args.calibration.calibration))
        goal = _budget.goal(args.budget, model.cfg, settings, args.dtype)
        task = _task(args, settings, model, goal)
        with stage(f"searching, {args.strategy}", seconds):
            found = dict(auto=_auto, adapruner=_adapruner, evolution=_evolution)[args.strategy](task)
        chosen = found.best if found.held_out[1] < found.held_out[0] else found.baseline
        unit = task.window.unit
        dense = Point(_dense_loss(task), task.window.cost(task.cfg), None, "dense")
        details = dict(strategy=args.strategy, settings=given, calibration=args.calibration.calibration)
        points.write(args.out, [dense, *found.points], unit, details)
        atomic_text(args.out / "plan.json", chosen.to_json() + "\n")
        result = {
            "loss, dense": dense.loss,
            "held-out loss, baseline": found.held_out[0],
            "held-out loss, search": found.held_out[1],
            "taken": "baseline" if chosen is found.baseline else "search",
            "candidates measured": len(found.points),
            f"{unit}, dense": round(dense.cost),
            f"{unit}, found": round(sizes.cost_of(chosen, task.cfg, task.window)),
            "fraction removed": round(1 - _shape(chosen, task).decoder_parameters / task.cfg.decoder_parameters, 4),
            "plan": str(args.out / "plan.json"),
            "seconds": seconds,
        }
        if goal is not None and goal.measure is not None:
            result["measured, ms"] = round(goal.measure(_shape(chosen, task)) * 1e3, 3)
            result["target, ms"] = round(goal.limit * 1e3, 3)
    return result | {"front": points.rows(points.front(found.points), unit)}


def _task(args: Search, settings: pipeline.Settings, model: folder.Model, goal: budgets.Target | None) -> Task:
    method = methods.find("taylor" if args.strategy == "adapruner" else methods.DEFAULT)
    own = 64 if args.strategy == "adapruner" else method.samples
    samples = args.calibration.samples or own
    length = args.calibration.length or method.length
    n = args.effort.fitness_samples
    if args.effort.fitness is None:
        tokens = draw(args.calibration, model, samples + n, length, False).tokens
        tokens, other = tokens[:samples], tokens[samples:]
    else:
        tokens = draw(args.calibration, model, samples, length, False).tokens
        other = draw(dataclasses.replace(args.calibration, calibration=args.effort.fitness), model, n, length, False).tokens
    if goal is None:
        check(model.cfg, round(model.cfg.decoder_parameters * settings.ratio), settings.constraints(model.cfg))
        window = sizes.of_ratio(model.cfg, settings.ratio, settings.multiple_of)
    else:
        part = budgets.WITHIN if goal.measure is None else budgets.NEAR
        window = Window(goal.cost, goal.limit * (1 - part), goal.limit, goal.what if goal.measure is None else "predicted s")
    constraints = settings.constraints(model.cfg)
    return Task(model, settings, constraints, window, tokens, other[: n // 2], other[n // 2 :], args, goal)


def _auto(task: Task) -> Outcome:
    params, cfg, window = task.model.params, task.cfg, task.window
    scores = _once(task, "scores.npz", lambda: _scores(task, methods.find(methods.DEFAULT).scorer))
    recipe = _narrow.widths(_recipe(task, scores), cfg)
    db = database.build(params, cfg, scores, _batches(task.tokens), task.constraints, progress=progress)
    measure = database.losses_of(
        params, cfg, db, at_once=task.args.effort.at_once, microbatch=pipeline.divisor(task.fitness.shape)
    )
    schedule = refine.Refinement()
    if task.args.effort.generations is not None:
        schedule = dataclasses.replace(schedule, generations=task.args.effort.generations)
    problem = refine.problem(cfg, db, measure, task.fitness, scores, window, task.constraints, schedule, recipe)
    found = _loop.evolve(
        problem, generations=schedule.generations, keep=schedule.keep, seed=task.args.calibration.seed, settings=task.record,
        checkpoint=task.args.out / "search.json", on_generation=_shown(window.unit, schedule.generations),
    )  # fmt: skip
    others = refine.at_other_sizes(cfg, db, measure, task.fitness, scores, window, task.constraints, recipe)
    start, best = refine.start(cfg, db, window, recipe), found.best[0][1]
    held = measure([start, best], task.held_out)
    plans = [_exact(task, problem.plan(levels), scores) for levels in (start, best)]
    return Outcome(plans[0], plans[1], (float(held[0]), float(held[1])), others + found.points)


def _exact(task: Task, plan: Plan, scores: PerLayer) -> Plan:
    """The plan with single multiples of channels less, or more, so that it has the asked size as nearly as they allow."""
    rng = np.random.default_rng(task.args.calibration.seed)
    for window in (sizes.tight(task.cfg, task.window, task.constraints.multiple_of), task.window):
        found = sizes.fit(plan, task.cfg, window, task.constraints, rng, scores)
        if found is not None:
            return found
    return plan


def _adapruner(task: Task) -> Outcome:
    from jaxprune.search.adapruner import adapruner

    args = task.args
    shape = _recipe(task, ())
    kept = _narrow.widths(shape, task.cfg)
    found = adapruner(
        task.model.params, task.cfg, task.tokens, _fitness(task, task.fitness), lambda scores: select(scores, kept),
        study=args.out / "study.db", trials=args.effort.trials, seed=args.calibration.seed, settings=task.record,
        microbatch=None, cost=lambda plan: sizes.cost_of(plan, task.cfg, task.window), on_trial=_told(task.window.unit),
    )  # fmt: skip
    baseline, best = found[0], min(found, key=lambda p: p.loss)
    assert baseline.plan is not None and best.plan is not None, "every trial keeps its plan"
    return Outcome(baseline.plan, best.plan, _pair(task, baseline.plan, best.plan), found)


def _evolution(task: Task) -> Outcome:
    args, cfg = task.args, task.cfg
    scores = _once(
        task, "scores.npz", lambda: _scores(task, lambda cfg, options: importance.obs_importance(cfg, task.model.params))
    )
    local = dataclasses.replace(task.settings, ranking="local")
    start = select(scores, _narrow.widths(_recipe(task._replace(settings=local), scores), cfg))
    schedule = evolution.SMALL if args.effort.preset == "small" else evolution.Evolution()
    changed: dict[str, Any] = dict(literal=args.effort.literal)
    if args.effort.generations is not None:
        changed["generations"] = args.effort.generations
    window = task.window
    if args.effort.equal_widths:
        changed |= dict(ratio_rate=0.0, first_ratio_rate=0.0, depth_rate=0.0)
        size = sizes.cost_of(start, cfg, window)
        window = window._replace(low=size, high=size)
    schedule = dataclasses.replace(schedule, **changed)
    limits = evolution.space(1 - _recipe(task, scores).decoder_parameters / cfg.decoder_parameters)
    problem = evolution.problem(cfg, start, _fitness(task, task.fitness), window, task.constraints, schedule, limits)
    found = _loop.evolve(
        problem, generations=schedule.generations, keep=schedule.keep, seed=args.calibration.seed, settings=task.record,
        checkpoint=args.out / "search.json", on_generation=_shown(window.unit, schedule.generations),
    )  # fmt: skip
    return Outcome(start, found.best[0][1], _pair(task, start, found.best[0][1]), found.points)


def _recipe(task: Task, scores: PerLayer) -> LlamaConfig:
    """The shape that the strategy's method would give."""
    if task.goal is not None:
        predicted = task.goal._replace(measure=None)
        return budgets.meet(_narrow.at_ratio(scores, task.cfg, task.settings), predicted, task.cfg).cfg
    budget = round(task.cfg.decoder_parameters * task.settings.ratio)
    return _narrow.shape(scores, task.cfg, budget, task.settings, task.cfg)


def _scores(task: Task, make: Any) -> PerLayer:
    batches = _batches(task.tokens)
    options = methods.Options(seed=task.settings.seed, microbatch=len(batches[0]))
    scorer = make(task.cfg, options)
    return scorers.score(scorer, task.model.params, models.probes(task.cfg), progress(batches, "scoring"))


def _once(task: Task, name: str, make: Callable[[], PerLayer]) -> PerLayer:
    """Scores of a file in the folder, or made and written there."""
    path = task.args.out / name
    if not path.is_file():
        file = io.BytesIO()
        np.savez(
            file, allow_pickle=False, **{f"{i}.{a}": np.asarray(x) for i, layer in enumerate(make()) for a, x in layer.items()}
        )
        atomic_bytes(path, file.getvalue())
    with np.load(path) as stored:
        return tuple({a: stored[f"{i}.{a}"] for a in "kf" if f"{i}.{a}" in stored} for i in range(len(task.cfg.layers)))


def _batches(tokens: np.ndarray) -> list[np.ndarray]:
    size = pipeline.divisor(tokens.shape)
    return [tokens[i : i + size] for i in range(0, len(tokens), size)]


def _fitness(task: Task, tokens: np.ndarray) -> Fitness:
    microbatch = pipeline.divisor(tokens.shape)
    return gate_fitness(task.model.params, task.cfg, tokens, at_once=task.args.effort.at_once, microbatch=microbatch)


def _pair(task: Task, *plans: Plan) -> tuple[float, float]:
    first, second = _fitness(task, task.held_out)(plans).tolist()
    return first, second


def _dense_loss(task: Task) -> float:
    return float(_fitness(task, task.fitness)([pipeline.identity(task.cfg, task.settings)])[0])


def _shape(plan: Plan, task: Task) -> LlamaConfig:
    return surgery.pruned_config(task.cfg, plan)


def _shown(unit: str, generations: int) -> Callable[[int, _loop.Found], None]:
    """Says after each generation where the search stands, with the front."""

    def show(generation: int, found: _loop.Found) -> None:
        say(f"generation {generation} of {generations}: best loss {found.best[0][0]:.4f}, {len(found.points)} candidates")
        say(table(points.rows(points.front(found.points), unit)))

    return show


def _told(unit: str) -> Callable[[int, Point], None]:
    every: list[Point] = []

    def tell(number: int, point: Point) -> None:
        every.append(point)
        say(f"{point.origin}: loss {point.loss:.4f}")
        if len(every) % 10 == 0:
            say(table(points.rows(points.front(every), unit)))

    return tell
