"""What a layer has to know beside its parameters, as arrays beside those of its run.

They are constants of the configuration and no parameters: nothing stores, counts, differentiates or trains them. Which layers
see the sliding window alone is one, so that layers whose kinds alternate are one `lax.scan`; which rotary pairs are left is the
other.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.models._runs import Run

WINDOWED, PAIRS = "windowed", "pairs"


def told(arrays: dict[str, Any], run: Run) -> dict[str, Any]:
    """The arrays of a run; beside them, where it has attention, the kinds of its layers and their rotary pairs.

    The kinds are bool[l], in a model of two kinds, and the pairs int[l, pairs], where not all are left.

    >>> from jaxprune.models import LayerDims, LlamaConfig, _kinds
    >>> shape = dict(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 48),) * 2)
    >>> cfg = LlamaConfig(**shape, sliding_window=8, windowed=(True, False))
    >>> _kinds.told({"q": "[l, d, k, g, h]"}, cfg.runs[0])["windowed"].tolist()
    [True, False]
    """
    if "q" not in arrays:
        return arrays
    kinds = {WINDOWED: np.array(run.windowed)} if run.windowed else {}
    return arrays | kinds | ({} if run.dims.pairs is None else {PAIRS: np.tile(run.dims.pairs, (run.length, 1))})


def layer_of(params: Any, run: Run, i: int) -> dict[str, Any]:
    """The arrays of layer `i` of a run, with its kind beside them."""
    return {name: x[i] for name, x in told(params.get(run.name, {}), run).items()}


def rope_of(p: dict, rope: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The rotary tables [t, pairs] of a layer, out of [2, t, h/2] where those of its kind are the second."""
    cos, sin = (jnp.where(p[WINDOWED], x[1], x[0]) if x.ndim == 3 else x for x in rope)
    return (cos[:, p[PAIRS]], sin[:, p[PAIRS]]) if PAIRS in p else (cos, sin)
