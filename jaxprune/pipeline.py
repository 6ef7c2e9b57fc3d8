"""The whole flow of pruning on one screen: score, allocate, select, reconstruct, cut, as often as asked."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxprune import _beside, _narrow, _profiles, budgets, methods, recovery, scorers, sensitivity, sequential, surgery
from jaxprune._constraints import check
from jaxprune._losses import Progress
from jaxprune._settings import Settings
from jaxprune.models import Config, LlamaConfig, MambaConfig, Params, PerLayer, Probes, _hf_mamba, probes, unit_counts
from jaxprune.models.mamba_config import only_llama
from jaxprune.plan import Plan

MICROBATCH_TOKENS = 2048  # tokens that go through a layer at a time


class Pruned(NamedTuple):
    """What `prune` made.

    Attributes:
      params, cfg: the smaller model.
      plan: what was kept.
      scores: of the first step, per layer, axis letter -> float32[units].
      notes: what the user should know, one line each.
      updates: what changed weights that stay, and the names of their arrays.
      met: how a target was met, or None where there was none.
    """

    params: Params
    cfg: Config
    plan: Plan
    scores: PerLayer
    notes: tuple[str, ...]
    updates: tuple[dict[str, Any], ...] = ()
    met: budgets.Met | None = None


def prune(
    params: Params,
    cfg: Config,
    tokens: Any,
    settings: Settings,
    on_step: Callable[[str], None] = lambda what: None,
    *,
    fit_tokens: Any = None,
    goal: budgets.Target | None = None,
    progress: Progress | None = None,
) -> Pruned:
    """Scores the units of a model, allocates the budget over its layers, reconstructs what stays and cuts.

    Args:
      params, cfg: the model.
      tokens: int32[samples * steps, t]: each step reads its own samples. None for methods that need weights alone.
      settings: what to do.
      on_step: called with what begins.
      fit_tokens: int32[samples, t] for reconstruction, or None for `tokens`.
      goal: what the smaller model may cost at most: the ratio that leads there takes the place of `settings.ratio`.
      progress: wraps sequences that take long; called with one and a description.

    Returns:
      The smaller model and its plan.

    Raises:
      ValueError: the settings do not fit the model, or the budget cannot be met at all.

    >>> import jax
    >>> from jaxprune import models, pipeline
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 2)
    >>> tokens = jax.numpy.arange(24).reshape(2, 12)
    >>> out = pipeline.prune(models.init(jax.random.key(0), cfg), cfg, tokens, pipeline.Settings(ratio=0.4))
    >>> out.cfg.decoder_parameters / cfg.decoder_parameters
    0.6
    """
    settings.check(cfg)
    _profiles.check(cfg, settings)
    if goal is not None:
        check_goal(only_llama(cfg, "target"), settings, goal)
    if settings.units == ("rotated",):
        return _sliced(params, cfg, np.asarray(tokens), settings, goal, on_step, progress)
    if settings.target is not None:
        recovery.check_target(only_llama(cfg, "reconstruct"), settings.target)
    constraints = settings.constraints(cfg)
    if set(settings.units) <= {"kv", "mlp", "inner"} and goal is None:
        check(cfg, round(cfg.decoder_parameters * settings.ratio), constraints)
    plan, now, small = identity(cfg, settings), cfg, params
    first: PerLayer = ()
    met = None
    for step in range(settings.steps):
        on_step(f"scoring, step {step + 1} of {settings.steps}")
        batch = None if tokens is None else np.array_split(np.asarray(tokens), settings.steps)[step]
        target = round(cfg.decoder_parameters * settings.ratio * (step + 1) / settings.steps)
        budget = target - (cfg.decoder_parameters - now.decoder_parameters)
        aim = Aim(cfg, settings, budget, goal, on_step)
        scores, shape, met = _scored(small, now, batch, aim, settings.seed + step, progress)
        first = first or scores
        on_step(f"cutting, step {step + 1} of {settings.steps}")
        plan = plan.then(_narrow.plan(scores, shape, now, settings))
        fit = tokens if fit_tokens is None else fit_tokens
        small, now, *_, updates, _ = by_plan(params, cfg, plan, fit, settings.target, progress=progress)
    notes = _notes(cfg, now, settings) if goal is None or met is None else budgets.notes(goal, met)
    return Pruned(small, now, plan, first, notes, updates, met)


def check_goal(cfg: LlamaConfig, settings: Settings, goal: budgets.Target) -> None:
    """Refuses a target before anything is scored: see `budgets.check`; with several steps there is none."""
    check_steps(settings)
    budgets.check(goal, cfg, _narrow.smallest(cfg, settings))


def check_steps(settings: Settings) -> None:
    """Refuses several steps, which a target has no use for."""
    if settings.steps > 1:
        raise ValueError(f"steps: {settings.steps} given; a target is met in one step; leave --steps out or give --ratio")


class Aim(NamedTuple):
    """Where a step leads.

    Attributes:
      dense: the model before the first step, which constraints are of.
      settings: what to do.
      budget: parameters that the step removes, unless there is a goal.
      goal: a target, or None.
      say: called with what was measured.
    """

    dense: Config
    settings: Settings
    budget: int
    goal: budgets.Target | None
    say: Callable[[str], None]

    def shape(self, curves: PerLayer, cfg: Config) -> tuple[Config, budgets.Met | None]:
        """The shape after the step, and how it meets the goal."""
        s = self.settings
        if self.goal is None:
            return _narrow.shape(curves, cfg, self.budget, s, self.dense), None
        fill = None
        if s.max_distinct is None and set(s.units) <= {"kv", "mlp"}:
            fill = ("f", s.multiple_of) if "mlp" in s.units else ("k", s.kv_multiple_of)
        met = budgets.meet(_narrow.at_ratio(curves, cfg, s), self.goal, only_llama(cfg, "target"), fill=fill, say=self.say)
        return met.cfg, met


def _sliced(
    params, cfg, tokens: np.ndarray, settings: Settings, goal: budgets.Target | None, say, progress: Progress | None
) -> Pruned:
    """Every matrix changes and there is no plan of units: what is returned keeps all units of the rotated model."""
    shape, met = Aim(cfg, settings, 0, goal, say).shape((), cfg)
    small, now = recovery.slice_gpt(params, cfg, batches(tokens, params), shape.d, progress=progress)
    small = _beside.moved(small, now, params)
    updates = ({"by": "rotation to principal components", "arrays": sorted(now.layer_arrays(now.layers[0]))},)
    notes = _notes(cfg, now, settings) if goal is None or met is None else budgets.notes(goal, met)
    return Pruned(small, now, identity(now, settings), (), notes, updates, met)


def by_plan(
    params: Params, cfg: Config, plan: Plan, tokens: Any, target: str | None, *, progress: Progress | None = None
) -> Pruned:
    """Reconstructs and cuts by a plan that is there already.

    Args:
      params, cfg: the model.
      plan: what to keep.
      tokens: int32[samples, t] for reconstruction; not read without one.
      target: see `recovery.reconstruct`; None leaves the weights as they are.
      progress: as in `prune`.

    Raises:
      ValueError: the plan does not fit the model, or there are no tokens to reconstruct on.
    """
    updates: tuple[dict[str, Any], ...] = ()
    fitted, fitted_cfg = params, cfg
    if target is not None:
        if tokens is None:
            raise ValueError(f"reconstruct: {target} given, which reads calibration tokens; give some, or set it to none")
        parts = batches(np.asarray(tokens), params)
        plan.check(cfg)
        dense = only_llama(cfg, "reconstruct")
        fitted, fitted_cfg = recovery.reconstruct(params, dense, plan.keep, parts, target=target, progress=progress)
        arrays = ["o_bias", "down_bias"] if target == "bias" else ["o", "down"]
        updates = ({"by": f"reconstruction, {target}", "arrays": arrays},)
    return Pruned(*surgery.cut(fitted, fitted_cfg, plan), plan, (), (), updates)


def identity(cfg: Config, settings: Settings) -> Plan:
    """The plan that keeps every unit."""
    units = "d" if settings.units == ("hidden",) else cfg.units
    counts = unit_counts(cfg, units)
    return Plan(tuple({a: np.arange(n) for a, n in layer.items()} for layer in counts), counts)


def batches(tokens: np.ndarray, params: Params = None) -> list[Any]:
    """Few batches of equal size, of about `MICROBATCH_TOKENS` tokens on each part of the mesh that `params` lie on."""
    size = divisor(tokens.shape, params)
    return [_beside.spread(params, tokens[i : i + size]) for i in range(0, len(tokens), size)]


def _few(tokens: np.ndarray | None, params: Params) -> Any:
    """At most `MICROBATCH_TOKENS` tokens to measure losses on."""
    if tokens is None:
        raise ValueError("ranking: sensitivity measures losses, and this method reads no text; choose another ranking")
    return _beside.spread(params, tokens[: divisor(tokens.shape, params)])


def divisor(shape: tuple[int, int], params: Params = None) -> int:
    """The most sequences that divide all of them and have at most `MICROBATCH_TOKENS` tokens.

    On a mesh that is the number of tokens on each of its parts; there, numbers that divide by the parts come first.
    """
    parts = _beside.shares(params)
    most = max(1, MICROBATCH_TOKENS // shape[1]) * parts
    found = [m for m in range(1, shape[0] + 1) if shape[0] % m == 0 and m <= most]
    return max([m for m in found if m % parts == 0] or found)


def _scored(params, cfg, tokens, aim: Aim, seed: int, progress: Progress | None) -> tuple[PerLayer, Config, budgets.Met | None]:
    """The scores of a step, the shape that it leads to, and how that meets the goal."""
    settings = aim.settings
    units = "d" if settings.units == ("hidden",) else cfg.units
    microbatch = None if tokens is None else divisor(tokens.shape, params)
    options = methods.Options(settings.taylor, settings.aggregate, seed, microbatch, units)
    if methods.find(settings.method).sequential and settings.allocation in methods.WITHOUT_SCORES:
        make = functools.partial(_scorer, settings.method, options=options)
        shape, met = aim.shape((), cfg)
        kept = _narrow.widths(shape, cfg)
        return sequential.score(make, params, cfg, batches(tokens, params), kept, progress=progress), shape, met
    scorer = _scorer(settings.method, cfg, options)
    parts = []
    if tokens is not None:
        parts = batches(tokens, params) if scorer.additive else [_beside.spread(params, tokens)]
    scores = curves = _by_layers(scorer, params, cfg, units, parts, settings.layers_at_once, progress)
    if settings.allocation == "sensitivity" and set(settings.units) <= {"kv", "mlp"}:
        curves = sensitivity.curves(params, cfg, scores, _few(tokens, params), progress=progress)
    return scores, *aim.shape(curves, cfg)


def _by_layers(scorer, params, cfg, units: str, parts: list, at_once: int | None, progress: Progress | None) -> PerLayer:
    """The scores of all layers, of so many at a time, each time from all parts."""
    layers = len(cfg.layers)
    size = min(at_once or layers, layers)
    out: list[Any] = []
    for first in range(0, layers, size):
        mine = range(first, min(first + size, layers))
        templates = probes(cfg, units, mine)
        what = "scoring" if size == layers else f"scoring layers {first} to {mine[-1]}"
        wrapped = parts if progress is None or len(parts) < 2 else progress(parts, what)
        alive = any(templates["gates"])  # all sublayers of these layers may be gone
        out += scorers.score(scorer, params, templates, wrapped)[first : mine.stop] if alive else [{}] * len(mine)
    return tuple(out)


@functools.lru_cache(maxsize=2)  # one scorer, one compiled program, however many calibration sets
def _scorer(method: str, cfg: Config, options: methods.Options) -> scorers.Scorer:
    make = methods.find(method).scorer
    assert make is not None, "a method that rotates has no scores"
    return make(cfg, options)


def gates(params: Params, cfg: Config, tokens: Any, settings: Settings, *, goal: budgets.Target | None = None) -> Probes:
    """The gates of what one step of `prune` would keep, nothing cut or reconstructed: see `calibration_choice.choose`.

    Args:
      params, cfg: the model.
      tokens: int32[samples, t].
      settings: what to do.
      goal: as in `prune`; what is measured there is predicted here.

    Raises:
      ValueError: the settings do not fit the model, or the budget cannot be met at all.
    """
    predicted = None if goal is None else goal._replace(measure=None)
    aim = Aim(cfg, settings, round(cfg.decoder_parameters * settings.ratio), predicted, lambda what: None)
    scores, shape, _ = _scored(params, cfg, np.asarray(tokens), aim, settings.seed, None)
    return surgery.gates_of(_narrow.plan(scores, shape, cfg, settings), cfg)


def _notes(cfg: Config, small: Config, settings: Settings) -> tuple[str, ...]:
    return (*_size_notes(cfg, small, settings), *(f"transformers cannot load it: {why}" for why in _unloadable(small)))


def _unloadable(cfg: Config) -> list[str]:
    return _hf_mamba.problems(cfg) if isinstance(cfg, MambaConfig) else []


def _size_notes(cfg: Config, small: Config, settings: Settings) -> tuple[str, ...]:
    reached = 1 - small.decoder_parameters / cfg.decoder_parameters
    if abs(reached - settings.ratio) <= 0.005:
        return ()
    reasons: dict[tuple[str, ...], str] = {
        ("sublayers",): "attentions and MLPs are removed whole",
        ("layers",): f"one layer is {1 / len(cfg.layers):.1%} of the decoder",
        ("hidden",): f"the width is cut in steps of {settings.multiple_of} of {cfg.d} channels",
        ("rotated",): "the width is cut in steps of 8 channels",
        ("kv",): "KV groups are removed whole",
        ("inner",): f"inner widths are multiples of {settings.multiple_of}: lower --multiple-of",
    }
    widths = f"MLP widths are multiples of {settings.multiple_of}, the same in all layers of a shape: lower --multiple-of"
    why = reasons.get(settings.units, widths)
    return (f"ratio {settings.ratio:.4f} asked, {reached:.4f} reached: {why}",)
