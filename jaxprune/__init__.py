"""Structured pruning of LLaMA-family language models as pure JAX functions."""

from jaxprune import allocate, models, recovery, scorers
from jaxprune.pipeline import Pruned, Settings, prune
from jaxprune.plan import Plan, select
from jaxprune.proof import Report, verify
from jaxprune.surgery import cut, gates_of, widen

__all__ = [
    "Plan",
    "Pruned",
    "Report",
    "Settings",
    "allocate",
    "cut",
    "gates_of",
    "models",
    "prune",
    "recovery",
    "scorers",
    "select",
    "verify",
    "widen",
]
