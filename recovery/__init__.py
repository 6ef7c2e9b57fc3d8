"""Recovery of a pruned model: closed-form reconstruction, low-rank adapters and their training."""

from jaxprune.recovery import lora, sparse
from jaxprune.recovery.least_squares import admm, least_squares_to, masked_least_squares, nested_least_squares
from jaxprune.recovery.loss import AdapterLoss, lm_loss
from jaxprune.recovery.obs import greedy
from jaxprune.recovery.reconstruct import TARGETS, reconstruct
from jaxprune.recovery.slicing import slice_gpt, sliced_width
from jaxprune.recovery.train import fit, schedule_and_optimizer

__all__ = [
    "TARGETS",
    "AdapterLoss",
    "admm",
    "fit",
    "greedy",
    "least_squares_to",
    "lm_loss",
    "lora",
    "masked_least_squares",
    "nested_least_squares",
    "reconstruct",
    "schedule_and_optimizer",
    "slice_gpt",
    "sliced_width",
    "sparse",
]
