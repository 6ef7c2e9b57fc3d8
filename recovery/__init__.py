"""Recovery of a pruned model: closed-form reconstruction, low-rank adapters, distillation and training."""

from jaxprune.recovery import lora, sparse
from jaxprune.recovery.distill import Pair, block_loss, distill_loss
from jaxprune.recovery.divergence import hidden_distance, logit_divergence
from jaxprune.recovery.layer_map import LayerMap, same_layers
from jaxprune.recovery.least_squares import admm, least_squares_to, masked_least_squares, nested_least_squares
from jaxprune.recovery.loss import AdapterLoss, assemble, lm_loss
from jaxprune.recovery.obs import greedy
from jaxprune.recovery.reconstruct import TARGETS, check_target, reconstruct
from jaxprune.recovery.slicing import slice_gpt, sliced_width
from jaxprune.recovery.train import fit, schedule_and_optimizer

__all__ = [
    "TARGETS",
    "AdapterLoss",
    "LayerMap",
    "Pair",
    "admm",
    "assemble",
    "block_loss",
    "check_target",
    "distill_loss",
    "fit",
    "greedy",
    "hidden_distance",
    "least_squares_to",
    "lm_loss",
    "logit_divergence",
    "lora",
    "masked_least_squares",
    "nested_least_squares",
    "reconstruct",
    "same_layers",
    "schedule_and_optimizer",
    "slice_gpt",
    "sliced_width",
    "sparse",
]
