"""Scorers: pure functions from calibration batches to one number per unit, for any loss over any pytree."""

from jaxprune.scorers._aggregate import aggregate
from jaxprune.scorers._base import Scorer, Scores, score
from jaxprune.scorers._combine import chain, mix, normalize, per_axis, scale, standardize
from jaxprune.scorers._mapped import mapped
from jaxprune.scorers.block_influence import block_influence, llm_bip
from jaxprune.scorers.curvature import curvature
from jaxprune.scorers.depth import earliest
from jaxprune.scorers.fluctuation import fluctuation
from jaxprune.scorers.gates import fisher, gate_taylor
from jaxprune.scorers.hywia import hywia
from jaxprune.scorers.magnitude import magnitude
from jaxprune.scorers.ntk import nirvana, ntk_gates, ntk_sgd, ntk_sign
from jaxprune.scorers.numerical import numerical
from jaxprune.scorers.random import random
from jaxprune.scorers.taylor import full_taylor, taylor
from jaxprune.scorers.wanda import wanda

__all__ = [
    "Scorer",
    "Scores",
    "aggregate",
    "block_influence",
    "chain",
    "curvature",
    "earliest",
    "fisher",
    "fluctuation",
    "full_taylor",
    "gate_taylor",
    "hywia",
    "llm_bip",
    "magnitude",
    "mapped",
    "mix",
    "nirvana",
    "normalize",
    "ntk_gates",
    "ntk_sgd",
    "ntk_sign",
    "numerical",
    "per_axis",
    "random",
    "scale",
    "score",
    "standardize",
    "taylor",
    "wanda",
]
