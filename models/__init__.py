"""LLaMA-family models as pure functions on one tree of arrays."""

from jaxprune.models import axes
from jaxprune.models.config import LayerDims, LlamaConfig, Run
from jaxprune.models.llama import (
    apply,
    block,
    count_parameters,
    head,
    hidden,
    init,
    loss_fn,
    probes,
    rms_norm,
    shapes,
    token_losses,
)
from jaxprune.models.types import LossFn, Params, PerLayer, Probes, Tokens
from jaxprune.models.units import sum_over_units, unit_costs, unit_counts

__all__ = [
    "LayerDims", "LlamaConfig", "LossFn", "Params", "PerLayer", "Probes", "Run", "Tokens", "apply", "axes", "block",
    "count_parameters", "head", "hidden", "init", "loss_fn", "probes", "rms_norm", "shapes", "sum_over_units", "token_losses", "unit_costs", "unit_counts",
]
