"""The shape that a step of pruning leads to, and the units that it then keeps."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from jaxprune import _shapes, allocate, methods, recovery
from jaxprune._constraints import full_widths
from jaxprune._settings import Settings
from jaxprune.models import LayerDims, LlamaConfig, PerLayer, unit_counts
from jaxprune.plan import Plan, Widths, select
from jaxprune.recovery import slicing


def shape(curves: PerLayer, cfg: LlamaConfig, budget: int, settings: Settings, dense: LlamaConfig) -> LlamaConfig:
    """The model after a step.

    Args:
      curves: scores, or measured curves where the ranking reads those; not read by rankings in `methods.WITHOUT_SCORES`.
      cfg: the model before it.
      budget: parameters to remove.
      settings: what to do.
      dense: the model before the first step, which constraints are of.

    Raises:
      ValueError: the budget is more than can be removed.
    """
    if settings.units == ("rotated",):
        return sliced(cfg, recovery.sliced_width(cfg, settings.ratio))
    constraints = settings.constraints(dense)
    if settings.units == ("hidden",):
        step = settings.multiple_of
        kept = round(cfg.d * (1 - budget / cfg.decoder_parameters) / step) * step
        return dataclasses.replace(cfg, d=min(max(kept, step), cfg.d))
    if settings.units in (("layers",), ("sublayers",)):
        rule = allocate.whole_layers if settings.units == ("layers",) else allocate.sublayers
        return with_widths(cfg, rule(curves, cfg, budget, constraints))
    widths = methods.RANKINGS[settings.allocation](curves, cfg, budget, constraints)
    if settings.max_distinct is not None:
        widths = _shapes.merge(widths, cfg, budget, constraints, settings.max_distinct)
    return with_widths(cfg, widths)


def at_ratio(curves: PerLayer, cfg: LlamaConfig, settings: Settings) -> Callable[[float], LlamaConfig]:
    """`shape` as a function of the ratio: what `budgets.meet` searches."""

    def at(ratio: float) -> LlamaConfig:
        there = dataclasses.replace(settings, ratio=ratio)
        return shape(curves, cfg, round(cfg.decoder_parameters * ratio), there, cfg)

    return at


def sliced(cfg: LlamaConfig, width: int) -> LlamaConfig:
    """What `recovery.slice_gpt` makes of a configuration."""
    return dataclasses.replace(cfg, d=width, shortcuts=True, norm_width=cfg.norm_width or cfg.d, tie_embeddings=False)


def smallest(cfg: LlamaConfig, settings: Settings) -> LlamaConfig | None:
    """The least that KV groups and MLP channels leave of a model; None where whole layers go, which the scores choose."""
    if settings.units == ("rotated",):
        return sliced(cfg, slicing.MULTIPLE)
    if settings.units == ("hidden",):
        return dataclasses.replace(cfg, d=min(settings.multiple_of, cfg.d))
    if not set(settings.units) <= {"kv", "mlp"}:
        return None
    constraints = dataclasses.replace(settings, ratio=1 - 1e-6).constraints(cfg)
    full = full_widths(cfg)
    for i in constraints.chosen(cfg):
        full[i] |= {a: constraints.fewest(a, n, i) for a, n in full[i].items() if a in constraints.units}
    return with_widths(cfg, tuple(full))


def narrower(cfg: LlamaConfig, settings: Settings) -> Callable[[int], LlamaConfig] | None:
    """Width of the residual stream -> shape, where that is what gets narrower; None where layers do."""
    if settings.units == ("rotated",):
        return functools.partial(sliced, cfg)
    if settings.units == ("hidden",):
        return lambda d: dataclasses.replace(cfg, d=d)
    return None


def widths(small: LlamaConfig, cfg: LlamaConfig) -> Widths:
    """Units that each layer of `cfg` keeps in `small`, per layer and axis letter."""
    return tuple({a: small.sizes(dims)[a] for a in before} for dims, before in zip(small.layers, full_widths(cfg), strict=True))


def plan(scores: PerLayer, small: LlamaConfig, cfg: LlamaConfig, settings: Settings) -> Plan:
    """The units with the highest scores, as many as the shape `small` has."""
    if settings.units == ("hidden",):
        return select(scores, ({"d": small.d},) * len(cfg.layers))
    kept = widths(small, cfg)
    if settings.units in (("layers",), ("sublayers",)):
        return Plan(tuple({a: np.arange(n) for a, n in layer.items()} for layer in kept), unit_counts(cfg, "kf"))
    return select(scores, kept)


def with_widths(cfg: LlamaConfig, kept: Widths) -> LlamaConfig:
    """The model whose layers keep so many units."""

    def narrow(dims: LayerDims, layer: dict[str, int]) -> LayerDims:
        kv = layer.get("k", dims.kv_heads)
        return LayerDims(kv, dims.q_per_kv if kv else 0, layer.get("f", dims.ff))

    return dataclasses.replace(cfg, layers=tuple(map(narrow, cfg.layers, kept)))
