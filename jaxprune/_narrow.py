"""The shape that a step of pruning leads to, and the units that it then keeps."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxprune import _shapes, allocate, methods, recovery
from jaxprune._constraints import full_widths
from jaxprune._settings import Settings
from jaxprune.models import Config, LlamaConfig, PerLayer, unit_counts
from jaxprune.models.mamba_config import only_llama
from jaxprune.plan import Plan, Widths, select
from jaxprune.recovery import slicing


def shape(curves: PerLayer, cfg: Config, budget: int, settings: Settings, dense: Config) -> Any:
    """The model after a step, of the kind of `cfg`.

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
        rotated = only_llama(cfg, "rotated")
        return slicing.sliced_config(rotated, recovery.sliced_width(rotated, settings.ratio))
    constraints = settings.constraints(dense)
    if settings.units == ("hidden",):
        step = settings.multiple_of
        kept = round(cfg.d * (1 - budget / cfg.decoder_parameters) / step) * step
        return dataclasses.replace(cfg, d=min(max(kept, step), cfg.d))
    if settings.units in (("layers",), ("sublayers",)):
        rule = allocate.whole_layers if settings.units == ("layers",) else allocate.sublayers
        return cfg.with_widths(rule(curves, cfg, budget, constraints))
    widths = methods.RANKINGS[settings.allocation](curves, cfg, budget, constraints)
    if settings.max_distinct is not None:
        widths = _shapes.merge(widths, only_llama(cfg, "max_distinct"), budget, constraints, settings.max_distinct)
    return cfg.with_widths(widths)


def at_ratio(curves: PerLayer, cfg: Config, settings: Settings) -> Callable[[float], Any]:
    """`shape` as a function of the ratio: what `budgets.meet` searches."""

    def at(ratio: float) -> Any:
        there = dataclasses.replace(settings, ratio=ratio)
        return shape(curves, cfg, round(cfg.decoder_parameters * ratio), there, cfg)

    return at


def smallest(cfg: LlamaConfig, settings: Settings) -> LlamaConfig | None:
    """The least that KV groups and MLP channels leave of a model; None where whole layers go, which the scores choose."""
    if settings.units == ("rotated",):
        return slicing.sliced_config(cfg, slicing.MULTIPLE)
    if settings.units == ("hidden",):
        return dataclasses.replace(cfg, d=min(settings.multiple_of, cfg.d))
    if not set(settings.units) <= {"kv", "mlp"}:
        return None
    constraints = dataclasses.replace(settings, ratio=1 - 1e-6).constraints(cfg)
    full = full_widths(cfg)
    for i in constraints.chosen(cfg):
        full[i] |= {a: constraints.fewest(a, n, i) for a, n in full[i].items() if a in constraints.units}
    return cfg.with_widths(tuple(full))


def narrower(cfg: LlamaConfig, settings: Settings) -> Callable[[int], LlamaConfig] | None:
    """Width of the residual stream -> shape, where that is what gets narrower; None where layers do."""
    if settings.units == ("rotated",):
        return functools.partial(slicing.sliced_config, cfg)
    if settings.units == ("hidden",):
        return lambda d: dataclasses.replace(cfg, d=d)
    return None


def widths(small: Config, cfg: Config) -> Widths:
    """Units that each layer of `cfg` keeps in `small`, per layer and axis letter."""
    return tuple({a: small.sizes(dims)[a] for a in before} for dims, before in zip(small.layers, full_widths(cfg), strict=True))


def plan(scores: PerLayer, small: Config, cfg: Config, settings: Settings) -> Plan:
    """The units with the highest scores, as many as the shape `small` has."""
    if settings.units == ("hidden",):
        return select(scores, ({"d": small.d},) * len(cfg.layers))
    kept = widths(small, cfg)
    if settings.units in (("layers",), ("sublayers",)):
        return Plan(tuple({a: np.arange(n) for a, n in layer.items()} for layer in kept), unit_counts(cfg))
    return select(scores, kept)
