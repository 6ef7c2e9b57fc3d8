"""Layers of two kinds in one run: which of them see the sliding window alone is an array beside those of the run.

It is a constant of the configuration and no parameter: nothing stores, counts, differentiates or trains it. So layers whose
kinds alternate are one `lax.scan`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.models._runs import Run

WINDOWED = "windowed"


def told(arrays: dict[str, Any], run: Run) -> dict[str, Any]:
    """The arrays of a run, with the kinds of its layers beside them, bool[l], if it has attention and a model of two kinds.

    >>> from jaxprune.models import LayerDims, LlamaConfig, _kinds
    >>> shape = dict(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 48),) * 2)
    >>> cfg = LlamaConfig(**shape, sliding_window=8, windowed=(True, False))
    >>> _kinds.told({"q": "[l, d, k, g, h]"}, cfg.runs[0])["windowed"].tolist()
    [True, False]
    """
    return arrays | {WINDOWED: np.array(run.windowed)} if run.windowed and "q" in arrays else arrays


def layer_of(params: Any, run: Run, i: int) -> dict[str, Any]:
    """The arrays of layer `i` of a run, with its kind beside them."""
    return {name: x[i] for name, x in told(params.get(run.name, {}), run).items()}


def rope_of(p: dict, rope: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The rotary tables [t, h/2] of a layer, out of [2, t, h/2] where those of its kind are the second."""
    cos, sin = (jnp.where(p[WINDOWED], x[1], x[0]) if x.ndim == 3 else x for x in rope)
    return cos, sin
