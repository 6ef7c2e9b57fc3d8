"""The methods that the command line knows by name: a scorer, its calibration, its paper."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxprune import scorers
from jaxprune.models import LlamaConfig, loss_fn, sum_over_units

UNITS = dict(kv="k", mlp="f", layers="l", hidden="d")


class Options(NamedTuple):
    """What a method may read besides the model.

    Attributes:
      taylor: variant of the Taylor score.
      aggregate: how the tensors of a unit are combined, or None for the method's own way.
      seed: of methods that draw random numbers.
      microbatch: sequences that go through a layer at a time.
      units: axis letters to score.
    """

    taylor: str = "param_first"
    aggregate: str | None = None
    seed: int = 0
    microbatch: int | None = None
    units: str = "kf"


class Method(NamedTuple):
    """A published method as the command line knows it.

    Attributes:
      summary: one line.
      paper: where it was published.
      needs: what it reads: weights, activations or gradients.
      scorer: (configuration, options) -> scorer.
      samples, length: calibration of the paper: sequences and tokens in each.
      units: unit names that it can score.
    """

    summary: str
    paper: str
    needs: str
    scorer: Callable[[LlamaConfig, Options], scorers.Scorer]
    samples: int = 10
    length: int = 128
    units: tuple[str, ...] = ("kv", "mlp", "layers")


def _random(cfg: LlamaConfig, options: Options) -> scorers.Scorer:
    del cfg
    return scorers.random(jax.random.key(options.seed))


def _magnitude(p: int, cfg: LlamaConfig, options: Options) -> scorers.Scorer:
    return scorers.magnitude(lambda tree: sum_over_units(tree, cfg, options.units), p, options.aggregate or "mean")


def _taylor(cfg: LlamaConfig, options: Options) -> scorers.Scorer:
    loss, how = loss_fn(cfg, microbatch=options.microbatch), options.aggregate or "sum"
    if "d" in options.units:
        return scorers.full_taylor(loss, lambda tree: sum_over_units(tree, cfg, options.units), options.taylor, how)
    return scorers.taylor(loss, options.taylor, how)


def _first_layers(cfg: LlamaConfig, options: Options) -> scorers.Scorer:
    del options
    return scorers.earliest(len(cfg.layers))


ALL = ("kv", "mlp", "layers", "hidden")

METHODS: dict[str, Method] = {
    "taylor": Method(
        "weight times gradient, summed over a unit (LLM-Pruner); --taylor chooses the variant",
        "Ma et al., LLM-Pruner, 2023, arXiv:2305.11627",
        "gradients",
        _taylor,
        units=ALL,
    ),
    "gate-taylor": Method(
        "derivative of the loss by a gate on the unit",
        "Molchanov et al., Importance Estimation for Neural Network Pruning, 2019, arXiv:1906.10771",
        "gradients",
        lambda cfg, options: scorers.gate_taylor(loss_fn(cfg, microbatch=options.microbatch)),
    ),
    "fisher": Method(
        "mean square, over sequences, of the derivative by a gate on the unit",
        "Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018, arXiv:1801.05787",
        "gradients",
        lambda cfg, options: scorers.fisher(loss_fn(cfg, microbatch=options.microbatch)),
        samples=32,
    ),
    "magnitude": Method(
        "sum of squared weights of a unit",
        "Li et al., Pruning Filters for Efficient ConvNets, 2017, arXiv:1608.08710",
        "weights",
        functools.partial(_magnitude, 2),
        units=ALL,
    ),
    "magnitude-l1": Method(
        "sum of absolute weights of a unit",
        "Li et al., Pruning Filters for Efficient ConvNets, 2017, arXiv:1608.08710",
        "weights",
        functools.partial(_magnitude, 1),
        units=ALL,
    ),
    "first-layers": Method(
        "keeps the first layers of the model (LLM-Pruner's layer-wise mode)",
        "Ma et al., LLM-Pruner, 2023, arXiv:2305.11627",
        "weights",
        _first_layers,
        units=("layers",),
    ),
    "random": Method("random units: what every method must beat", "-", "weights", _random, units=ALL),
}


def find(name: str) -> Method:
    """The method of that name.

    Raises:
      ValueError: there is none.
    """
    if name not in METHODS:
        raise ValueError(f"method: {name!r} given; allowed are {', '.join(METHODS)} (see `jaxprune methods`)")
    return METHODS[name]


def default_units(name: str) -> tuple[str, ...]:
    """KV groups and MLP channels, or what the method scores instead."""
    units = find(name).units
    return ("kv", "mlp") if {"kv", "mlp"} <= set(units) else units[:1]
