"""Recovery of a pruned model: low-rank adapters and their training."""

from jaxprune.recovery import lora
from jaxprune.recovery.loss import AdapterLoss, lm_loss
from jaxprune.recovery.train import fit, schedule_and_optimizer

__all__ = ["AdapterLoss", "fit", "lm_loss", "lora", "schedule_and_optimizer"]
