"""Scorers: pure functions from calibration batches to one number per unit, for any loss over any pytree."""

from jaxprune.scorers._aggregate import aggregate
from jaxprune.scorers._base import Scorer, Scores, score
from jaxprune.scorers._combine import chain, mix, normalize, per_axis, scale, standardize
from jaxprune.scorers.block_influence import block_influence, llm_bip
from jaxprune.scorers.depth import earliest
from jaxprune.scorers.fluctuation import fluctuation
from jaxprune.scorers.gates import fisher, gate_taylor
from jaxprune.scorers.magnitude import magnitude
from jaxprune.scorers.numerical import numerical
from jaxprune.scorers.random import random
from jaxprune.scorers.taylor import full_taylor, taylor
from jaxprune.scorers.wanda import wanda

__all__ = [
    "wanda",
    "numerical",
    "llm_bip",
    "fluctuation",
    "block_influence",
    "Scorer",
    "Scores",
    "aggregate",
    "chain",
    "earliest",
    "fisher",
    "full_taylor",
    "gate_taylor",
    "magnitude",
    "mix",
    "normalize",
    "per_axis",
    "random",
    "scale",
    "score",
    "standardize",
    "taylor",
]
