"""Sparsity in one shot: which weights of a matrix go, and how those that stay make up for them, from second moments alone."""

from jaxprune.recovery.sparse.apt import VARIANTS, apt
from jaxprune.recovery.sparse.compensate import SOLVERS, compensate
from jaxprune.recovery.sparse.pattern import Pattern, keep_largest, n_of_m, violations
from jaxprune.recovery.sparse.sparsegpt import Sparse, sparsegpt
from jaxprune.recovery.sparse.system import System, relative_loss, system
from jaxprune.recovery.sparse.wanda import wanda

__all__ = [
    "SOLVERS",
    "VARIANTS",
    "Pattern",
    "Sparse",
    "System",
    "apt",
    "compensate",
    "keep_largest",
    "n_of_m",
    "relative_loss",
    "sparsegpt",
    "system",
    "violations",
    "wanda",
]
