"""A search of a tiny model, for `test_adapruner`: python tiny_search.py STUDY KILL_AT kills itself in that measurement."""

import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np

from jaxprune import models, plan
from jaxprune.search.adapruner import adapruner

CFG = models.LlamaConfig(vocab=64, d=16, head_dim=4, layers=(models.LayerDims(2, 2, 24),) * 2)
PARAMS = jax.tree.map(lambda x: 3 * x, models.init(jax.random.key(0), CFG))
POOL = np.random.default_rng(1).integers(0, 64, (12, 8), np.int32)


def half(scores):
    return plan.select(scores, ({"k": 1, "f": 12},) * 2)


def losses(plans):
    """Stands for a model: low for high channels."""
    return np.array([-float(sum(p.keep[0]["f"]) + sum(p.keep[1]["f"])) for p in plans])


def search(study, fitness=losses, plan_of=half, **options):
    options = dict(trials=8, subsets=4, subset_size=4, startup=3) | options
    return adapruner(PARAMS, CFG, POOL, fitness, plan_of, study=study, **options)


def main(study, kill_at):
    measured = iter(range(kill_at + 1))

    def fitness(plans):
        if next(measured) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return losses(plans)

    search(Path(study), fitness)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
