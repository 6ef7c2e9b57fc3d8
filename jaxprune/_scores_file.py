"""Scores as a file of NumPy arrays, `LAYER.AXIS` each."""

import io
from pathlib import Path

import numpy as np

from jaxprune._files import atomic_bytes
from jaxprune.models import PerLayer, axes


def write_scores(path: Path, scores: PerLayer) -> None:
    """Writes scores whole or not at all.

    Args:
      path: the file, `.npz`.
      scores: per layer, axis letter -> float32[units].
    """
    file = io.BytesIO()
    named = {f"{i}.{a}": np.asarray(x) for i, layer in enumerate(scores) for a, x in layer.items()}
    np.savez(file, allow_pickle=False, **named)
    atomic_bytes(path, file.getvalue())


def read_scores(path: Path, layers: int) -> PerLayer:
    """Reads what `write_scores` wrote of a model with so many layers; axes that are not there are absent."""
    with np.load(path) as stored:
        return tuple({a: stored[f"{i}.{a}"] for a in axes.UNITS if f"{i}.{a}" in stored} for i in range(layers))
