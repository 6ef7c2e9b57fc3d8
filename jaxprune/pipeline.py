"""The whole flow of pruning on one screen: score, allocate, select, reconstruct, cut, as often as asked."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxprune import _shapes, allocate, methods, recovery, scorers, sensitivity, sequential, surgery
from jaxprune._constraints import check
from jaxprune._losses import Progress
from jaxprune._settings import Settings
from jaxprune.models import LlamaConfig, Params, PerLayer, Probes, probes, unit_counts
from jaxprune.plan import Plan, Widths, select

MICROBATCH_TOKENS = 2048  # tokens that go through a layer at a time


class Pruned(NamedTuple):
    """What `prune` made.

    Attributes:
      params, cfg: the smaller model.
      plan: what was kept.
      scores: of the first step, per layer, axis letter -> float32[units].
      notes: what the user should know, one line each.
      updates: what changed weights that stay, and the names of their arrays.
    """

    params: Params
    cfg: LlamaConfig
    plan: Plan
    scores: PerLayer
    notes: tuple[str, ...]
    updates: tuple[dict[str, Any], ...] = ()


def prune(
    params: Params,
    cfg: LlamaConfig,
    tokens: Any,
    settings: Settings,
    on_step: Callable[[str], None] = lambda what: None,
    *,
    fit_tokens: Any = None,
    progress: Progress | None = None,
) -> Pruned:
    """Scores the units of a model, allocates the budget over its layers, reconstructs what stays and cuts.

    Args:
      params, cfg: the model.
      tokens: int32[samples * steps, t]: each step reads its own samples. None for methods that need weights alone.
      settings: what to do.
      on_step: called with what begins.
      fit_tokens: int32[samples, t] for reconstruction, or None for `tokens`.
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
    if settings.units == ("rotated",):
        return _sliced(params, cfg, np.asarray(tokens), settings, progress)
    constraints = settings.constraints(cfg)
    if set(settings.units) <= {"kv", "mlp"}:
        check(cfg, round(cfg.decoder_parameters * settings.ratio), constraints)
    plan, now, small = identity(cfg, settings), cfg, params
    first: PerLayer = ()
    for step in range(settings.steps):
        on_step(f"scoring, step {step + 1} of {settings.steps}")
        batch = None if tokens is None else np.array_split(np.asarray(tokens), settings.steps)[step]
        target = round(cfg.decoder_parameters * settings.ratio * (step + 1) / settings.steps)
        budget = target - (cfg.decoder_parameters - now.decoder_parameters)
        scores = _score(small, now, batch, settings, settings.seed + step, budget, constraints, progress)
        first = first or scores
        on_step(f"cutting, step {step + 1} of {settings.steps}")
        more = _plan(small, now, batch, scores, budget, settings, constraints, progress)
        plan = plan.then(more)
        fit = tokens if fit_tokens is None else fit_tokens
        small, now, _, _, _, updates = by_plan(params, cfg, plan, fit, settings.target, progress=progress)
    return Pruned(small, now, plan, first, _notes(cfg, now, settings), updates)


def _sliced(params, cfg, tokens: np.ndarray, settings: Settings, progress: Progress | None) -> Pruned:
    """Every matrix changes and there is no plan of units: what is returned keeps all units of the rotated model."""
    width = recovery.sliced_width(cfg, settings.ratio)
    small, now = recovery.slice_gpt(params, cfg, _batches(tokens), width, progress=progress)
    updates = ({"by": "rotation to principal components", "arrays": sorted(now.layer_arrays(now.layers[0]))},)
    return Pruned(small, now, identity(now, settings), (), _notes(cfg, now, settings), updates)


def by_plan(
    params: Params, cfg: LlamaConfig, plan: Plan, tokens: Any, target: str | None, *, progress: Progress | None = None
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
        batches = _batches(np.asarray(tokens))
        plan.check(cfg)
        fitted, fitted_cfg = recovery.reconstruct(params, cfg, plan.keep, batches, target=target, progress=progress)
        arrays = ["o_bias", "down_bias"] if target == "bias" else ["o", "down"]
        updates = ({"by": f"reconstruction, {target}", "arrays": arrays},)
    return Pruned(*surgery.cut(fitted, fitted_cfg, plan), plan, (), (), updates)


def identity(cfg: LlamaConfig, settings: Settings) -> Plan:
    """The plan that keeps every unit."""
    units = "d" if settings.units == ("hidden",) else "kf"
    counts = unit_counts(cfg, units)
    return Plan(tuple({a: np.arange(n) for a, n in layer.items()} for layer in counts), counts)


def _batches(tokens: np.ndarray) -> list[np.ndarray]:
    """Few batches of equal size, of about `MICROBATCH_TOKENS` tokens."""
    size = divisor(tokens.shape)
    return [tokens[i : i + size] for i in range(0, len(tokens), size)]


def _few(tokens: np.ndarray | None) -> np.ndarray:
    """At most `MICROBATCH_TOKENS` tokens to measure losses on."""
    if tokens is None:
        raise ValueError("ranking: sensitivity measures losses, and this method reads no text; choose another ranking")
    return tokens[: divisor(tokens.shape)]


def divisor(shape: tuple[int, int]) -> int:
    """The most sequences that divide all of them and have at most `MICROBATCH_TOKENS` tokens."""
    most = max(1, MICROBATCH_TOKENS // shape[1])
    return max(m for m in range(1, shape[0] + 1) if shape[0] % m == 0 and m <= most)


def _score(
    params,
    cfg,
    tokens,
    settings: Settings,
    seed: int,
    budget: int,
    constraints: allocate.Constraints,
    progress: Progress | None,
) -> PerLayer:
    units = "d" if settings.units == ("hidden",) else "kf"
    microbatch = None if tokens is None else divisor(tokens.shape)
    options = methods.Options(settings.taylor, settings.aggregate, seed, microbatch, units)
    if methods.find(settings.method).sequential and settings.allocation in methods.WITHOUT_SCORES:
        make = functools.partial(_scorer, settings.method, options=options)
        widths = _widths((), cfg, budget, settings, constraints)
        return sequential.score(make, params, cfg, _batches(tokens), widths, progress=progress)
    scorer = _scorer(settings.method, cfg, options)
    batches = [] if tokens is None else _batches(tokens) if scorer.additive else [tokens]
    wrapped = batches if progress is None or len(batches) < 2 else progress(batches, "scoring")
    return scorers.score(scorer, params, probes(cfg, units), wrapped)


@functools.lru_cache(maxsize=2)  # one scorer, one compiled program, however many calibration sets
def _scorer(method: str, cfg: LlamaConfig, options: methods.Options) -> scorers.Scorer:
    make = methods.find(method).scorer
    assert make is not None, "a method that rotates has no scores"
    return make(cfg, options)


def gates(params: Params, cfg: LlamaConfig, tokens: Any, settings: Settings) -> Probes:
    """The gates of what one step of `prune` would keep, nothing cut or reconstructed: see `calibration_choice.choose`.

    Args:
      params, cfg: the model.
      tokens: int32[samples, t].
      settings: what to do.

    Raises:
      ValueError: the settings do not fit the model, or the budget cannot be met at all.
    """
    tokens = np.asarray(tokens)
    budget, constraints = round(cfg.decoder_parameters * settings.ratio), settings.constraints(cfg)
    scores = _score(params, cfg, tokens, settings, settings.seed, budget, constraints, None)
    plan = _plan(params, cfg, tokens, scores, budget, settings, constraints, None)
    return surgery.gates_of(plan, cfg)


def _plan(
    params,
    cfg,
    tokens,
    scores: PerLayer,
    budget: int,
    settings: Settings,
    constraints: allocate.Constraints,
    progress: Progress | None,
) -> Plan:
    if settings.units == ("hidden",):
        step = settings.multiple_of
        kept = round(cfg.d * (1 - budget / cfg.decoder_parameters) / step) * step
        return select(scores, ({"d": min(max(kept, step), cfg.d)},) * len(cfg.layers))
    if settings.units in (("layers",), ("sublayers",)):
        rule = allocate.whole_layers if settings.units == ("layers",) else allocate.sublayers
        return _all_or_nothing(rule(scores, cfg, budget, constraints), cfg)
    curves = scores
    if settings.allocation == "sensitivity":
        curves = sensitivity.curves(params, cfg, scores, _few(tokens), progress=progress)
    return select(scores, _widths(curves, cfg, budget, settings, constraints))


def _widths(curves: PerLayer, cfg: LlamaConfig, budget: int, settings: Settings, constraints: allocate.Constraints) -> Widths:
    widths = methods.RANKINGS[settings.allocation](curves, cfg, budget, constraints)
    if settings.max_distinct is None:
        return widths
    return _shapes.merge(widths, cfg, budget, constraints, settings.max_distinct)


def _all_or_nothing(widths: PerLayer, cfg: LlamaConfig) -> Plan:
    return Plan(tuple({a: np.arange(n) for a, n in layer.items()} for layer in widths), unit_counts(cfg, "kf"))


def _notes(cfg: LlamaConfig, small: LlamaConfig, settings: Settings) -> tuple[str, ...]:
    reached = 1 - small.decoder_parameters / cfg.decoder_parameters
    if abs(reached - settings.ratio) <= 0.005:
        return ()
    reasons: dict[tuple[str, ...], str] = {
        ("sublayers",): "attentions and MLPs are removed whole",
        ("layers",): f"one layer is {1 / len(cfg.layers):.1%} of the decoder",
        ("hidden",): f"the width is cut in steps of {settings.multiple_of} of {cfg.d} channels",
        ("rotated",): "the width is cut in steps of 8 channels",
        ("kv",): "KV groups are removed whole",
    }
    widths = f"MLP widths are multiples of {settings.multiple_of}, the same in all layers of a shape: lower --multiple-of"
    why = reasons.get(settings.units, widths)
    return (f"ratio {settings.ratio:.4f} asked, {reached:.4f} reached: {why}",)
