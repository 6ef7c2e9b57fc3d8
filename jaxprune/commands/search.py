"""`jaxprune search`: which units to remove, found by measuring many candidates."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from jaxprune import _hosts, _narrow, _profiles, budgets, data, folder, methods, pipeline, surgery
from jaxprune._constraints import check
from jaxprune._files import atomic_text
from jaxprune._json import plain
from jaxprune.commands import _budget, _devices
from jaxprune.commands._calibration import Calibration, draw, up_to_a_row
from jaxprune.commands._common import ModelName, Output, Profile, flag, layer_range, stage
from jaxprune.commands._compute import Compute
from jaxprune.commands._stages import flags_of, kept, opened
from jaxprune.commands._strategies import STRATEGIES, Effort, Task
from jaxprune.search import points, sizes
from jaxprune.search.points import Point
from jaxprune.search.sizes import Window

METHODS = dict(auto=methods.DEFAULT, adapruner="taylor", evolution="taylor")  # whose settings a strategy starts from


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
    """MLP widths are multiples of this, and of the mesh's tensor axis."""
    kv_multiple_of: Annotated[int | None, flag("N", "the mesh's tensor axis, or 1")] = None
    """Numbers of KV groups that change are multiples of this; with more than a layer has, it loses none."""
    min_kept: Annotated[float | None, flag("F", "the method's own")] = None
    """Every MLP keeps at least this fraction of its channels."""
    profile: Profile = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """Search for the units to remove. Started again, it goes on where it stopped; `jaxprune prune --plan` cuts the result.

    auto: our recipe's allocation, then exchanges of width between layers, measured on a database of compressed layers.
    adapruner: calibration subset and importance metric by Bayesian optimisation. evolution: masks, from the paper Search for
    Efficient LLMs. Example: jaxprune search smollm2 --out found --ratio 0.2
    """

    model: ModelName
    out: Annotated[Path, flag("DIR")]
    """Folder for plan.json, baseline.json, pareto.json, pareto.png and what the search needs to go on."""
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
    devices: _devices.Devices = _devices.Devices()
    hosts: _devices.Hosts = _devices.Hosts()
    compute: Compute = Compute()
    output: Output = Output()

    def kept(self) -> str | None:
        """How to go on after an interruption, or None where nothing was kept."""
        return kept(self.out)

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
            **self.devices.multiples(("kv", "mlp"), self.limits.multiple_of, self.limits.kv_multiple_of),
            min_kept=self.limits.min_kept,
            profile=self.limits.profile,
            seed=self.calibration.seed,
        )
        _budget.check(self.budget, settings, ratio=self.ratio)
        for name, least in dict(fitness_samples=2, trials=1, at_once=1).items():
            if (value := getattr(self.effort, name)) < least:
                raise ValueError(f"{name}: {value} given; it must be at least {least}")
        for name in ("samples", "length"):
            if (value := getattr(self.calibration, name)) is not None and value < 1:
                raise ValueError(f"{name}: {value} given; it must be at least 1")
        if self.effort.generations is not None and self.effort.generations < 0:
            raise ValueError(f"generations: {self.effort.generations} given; it must be at least 0")
        if self.effort.equal_widths and self.strategy != "evolution":
            raise ValueError(
                f"equal_widths: {self.strategy} chooses widths; use --strategy evolution, or prune --max-distinct 1"
            )
        if self.effort.attention_units == "pairs" and self.strategy != "evolution":
            raise ValueError(
                f"attention_units: pairs given with --strategy {self.strategy}; only evolution takes rotary pairs away"
            )
        if self.effort.attention_units == "pairs" and (self.limits.profile or "hf-custom") not in ("hf-custom", "hf-padded"):
            raise ValueError(
                f"for: {self.limits.profile} given, whose heads have all rotary pairs; use hf-custom or hf-padded, or leave "
                "--attention-units at groups"
            )
        if settings.max_distinct == 1 and not (self.effort.equal_widths or self.strategy == "adapruner"):
            raise ValueError(
                f"for: {self.limits.profile} given, whose layers are all equal, and {self.strategy} chooses widths; use "
                "--strategy evolution --equal-widths or adapruner, or prune --for"
            )
        if self.calibration.calibration == "self" or self.calibration.candidates > 1:
            raise ValueError("calibration: self and --candidates are not for a search; name a text")
        return settings


def run(args: Search) -> dict[str, Any]:
    """Searches; returns the table of what was found."""
    settings, seconds = args.settings(), dict[str, float]()
    if args.strategy == "adapruner" and _hosts.several():
        raise ValueError(
            "strategy: adapruner given in several processes; its study is of one process, so take auto or evolution"
        )
    given = plain(flags_of(args))
    with opened(args.out, given, overwrite=args.overwrite):
        with stage("loading", seconds):
            needs_tokenizer = not data.is_token_file(args.calibration.calibration)
            model = _devices.load(args.devices, args.model, args.dtype, needs_tokenizer=needs_tokenizer)
        _profiles.check(model.cfg, settings)
        goal = _budget.goal(args.budget, model.cfg, settings, args.dtype)
        task = _task(args, settings, model, goal, given)
        with stage(f"searching, {args.strategy}", seconds):
            found = STRATEGIES[args.strategy](task)
        chosen = found.best if found.held_out[1] < found.held_out[0] else found.baseline
        unit, small = task.window.unit, surgery.pruned_config(task.cfg, chosen)
        dense = Point(found.dense, task.window.cost(task.cfg), None, "dense")
        details = dict(strategy=args.strategy, settings=given, calibration=args.calibration.calibration)
        _hosts.by_first(points.write, args.out, [dense, *found.points], unit, details)
        for name, plan in (("plan", chosen), ("baseline", found.baseline)):
            _hosts.by_first(atomic_text, args.out / f"{name}.json", plan.to_json() + "\n")
        result = {
            "loss, dense": dense.loss,
            "held-out loss, baseline": found.held_out[0],
            "held-out loss, search": found.held_out[1],
            "taken": "baseline" if chosen is found.baseline else "search",
            "candidates measured": len(found.points),
            f"{unit}, dense": round(dense.cost),
            f"{unit}, found": round(task.window.cost(small)),
            "fraction removed": round(1 - small.decoder_parameters / task.cfg.decoder_parameters, 4),
            "plan": str(args.out / "plan.json"),
            "seconds": seconds,
        }
        if goal is not None and goal.measure is not None:
            result["measured, ms"] = round(goal.measure(small) * 1e3, 3)
            result["target, ms"] = round(goal.limit * 1e3, 3)
    return result | {"front": points.rows(points.front(found.points), unit)}


def _task(
    args: Search, settings: pipeline.Settings, model: folder.Model, goal: budgets.Target | None, record: dict[str, Any]
) -> Task:
    method = methods.find("taylor" if args.strategy == "adapruner" else methods.DEFAULT)
    samples = args.calibration.samples or (64 if args.strategy == "adapruner" else method.samples)
    length = args.calibration.length or up_to_a_row(args.calibration.calibration, method.length)
    n = args.effort.fitness_samples
    source = args.effort.fitness
    own = source is None  # then both come from one draw, whose windows do not overlap
    found = draw(args.calibration, model, samples + n * own, length, False)
    if args.calibration.calibration_sha256 is not None:
        data.check_sha256(args.calibration.calibration_sha256, found.sha256, args.calibration.calibration)
    tokens, other = found.tokens[:samples], found.tokens[samples:]
    if source is not None:
        other = draw(dataclasses.replace(args.calibration, calibration=source), model, n, length, False).tokens
    if goal is None:
        check(model.cfg, round(model.cfg.decoder_parameters * settings.ratio), settings.constraints(model.cfg))
        window = sizes.of_ratio(model.cfg, settings.ratio, settings.multiple_of)
    else:
        local, predicted = dataclasses.replace(settings, ranking="local"), goal._replace(measure=None)
        ratio = budgets.meet(_narrow.at_ratio((), model.cfg, local), predicted, model.cfg).ratio
        settings = dataclasses.replace(settings, ratio=min(max(ratio, 1e-6), 1 - 1e-6))  # which constraints depend on
        window = _window(goal)
    constraints = settings.constraints(model.cfg)
    return Task(
        model, settings, constraints, window, tokens, other[: n // 2], other[n // 2 :], goal, args.effort, args.out, record
    )


def _window(goal: budgets.Target) -> Window:
    """Sizes that meet a target; times in milliseconds."""
    if goal.measure is None:
        return Window(goal.cost, goal.limit * (1 - budgets.WITHIN), goal.limit, goal.what)
    return Window(lambda cfg: 1e3 * goal.cost(cfg), 1e3 * goal.limit * (1 - budgets.NEAR), 1e3 * goal.limit, "predicted ms")
