"""LLaMA-family models and Mamba as pure functions on one tree of arrays."""

from jaxprune.models import axes, mamba
from jaxprune.models._hf import from_hf_config, to_hf_config
from jaxprune.models._how import computing
from jaxprune.models._kinds import layer_of
from jaxprune.models._runs import Run
from jaxprune.models.checkpoint import load, resolve, save
from jaxprune.models.config import LayerDims, LlamaConfig
from jaxprune.models.flax_tree import from_flax, load_flax_msgpack, save_flax_msgpack, to_flax
from jaxprune.models.forward import apply, hidden
from jaxprune.models.llama import block, embedded, head, mlp, project, rms_norm, stream_norm
from jaxprune.models.losses import loss_fn, max_logits_fn, sample_targets, token_kl, token_losses
from jaxprune.models.mamba_config import MambaConfig, MambaDims
from jaxprune.models.module import Llama
from jaxprune.models.observe import Site, observe, reads, residuals, sublayer
from jaxprune.models.params import count_parameters, init, probes, shapes
from jaxprune.models.tokenizer import load_tokenizer
from jaxprune.models.types import Config, LossFn, Params, PerLayer, Probes, Tokens
from jaxprune.models.units import sum_over_units, unit_costs, unit_counts

__all__ = [
    "Config",
    "LayerDims",
    "Llama",
    "LlamaConfig",
    "LossFn",
    "MambaConfig",
    "MambaDims",
    "Params",
    "PerLayer",
    "Probes",
    "Run",
    "Site",
    "Tokens",
    "apply",
    "axes",
    "block",
    "computing",
    "count_parameters",
    "embedded",
    "from_flax",
    "from_hf_config",
    "head",
    "hidden",
    "init",
    "layer_of",
    "load",
    "load_flax_msgpack",
    "load_tokenizer",
    "loss_fn",
    "mamba",
    "max_logits_fn",
    "mlp",
    "observe",
    "probes",
    "project",
    "resolve",
    "rms_norm",
    "reads",
    "residuals",
    "sample_targets",
    "save",
    "save_flax_msgpack",
    "shapes",
    "stream_norm",
    "sublayer",
    "sum_over_units",
    "to_flax",
    "to_hf_config",
    "token_kl",
    "token_losses",
    "unit_costs",
    "unit_counts",
]
