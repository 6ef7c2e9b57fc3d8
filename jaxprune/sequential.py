"""Layer-sequential scores: each layer is scored on what the pruned layers before it pass on."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import scorers
from jaxprune._losses import Progress
from jaxprune.models import LlamaConfig, Params, PerLayer, embedded, layer_of, probes, sublayer
from jaxprune.models._mesh import on_host
from jaxprune.models._runs import places
from jaxprune.models.axes import OUTPUT
from jaxprune.plan import Widths, select
from jaxprune.surgery import gates_of


def score(
    make: Callable[[LlamaConfig], scorers.Scorer],
    params: Params,
    cfg: LlamaConfig,
    batches: Sequence[Any],
    widths: Widths,
    *,
    progress: Progress | None = None,
) -> PerLayer:
    """Scores one layer after the other, the layers before it pruned to their widths by their own scores.

    The residual stream of all calibration tokens is kept, [samples, t, d], and each layer is scored as a model of its own that
    reads it as its embedding. Widths have to be known before the scores, as they are with `allocate.local`.

    Args:
      make: configuration of such a model -> a scorer that needs activations.
      params, cfg: the dense model.
      batches: int32[b, t] arrays of calibration tokens of one shape.
      widths: per layer, axis letter -> units to keep, as an allocator returns them.
      progress: wraps the sequence of layers; called with it and a description.

    Returns:
      Per layer, axis letter -> float32[units]. Those of the first layer are what the scorer says of the dense model.

    Raises:
      ValueError: no batches, or a scorer that needs gradients.

    Reference: the order is that of Frantar and Alistarh, `SparseGPT <https://arxiv.org/abs/2301.00774>`_, 2023, and of the
    released code of Wanda and Wanda-sp.

    >>> import functools, jax
    >>> from jaxprune import models, scorers, sequential
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 2)
    >>> params, tokens = models.init(jax.random.key(0), cfg), jax.numpy.arange(12).reshape(2, 6)
    >>> make = lambda one: scorers.wanda(functools.partial(models.observe, cfg=one))
    >>> found = sequential.score(make, params, cfg, [tokens], ({"k": 2, "f": 24},) * 2)
    >>> found[1]["f"].shape
    (48,)
    """
    if not batches:
        raise ValueError("batches: none given; scores need at least one batch of calibration tokens")
    tokens = np.concatenate([on_host(b) for b in batches])
    stream = on_host(embedded(params, jnp.asarray(tokens), cfg))
    ids = np.split(np.arange(tokens.size, dtype=np.int32).reshape(tokens.shape), len(batches))
    where = places(cfg.runs)
    out: list[dict[str, Any]] = []
    for layer in range(len(where)) if progress is None else progress(range(len(where)), "scoring layer by layer"):
        run, i = where[layer]
        arrays = {n: x[i] for n, x in params.get(run.name, {}).items()}
        one = _alone(cfg, layer, tokens.size)
        alone = {"embed": stream.reshape(-1, cfg.d)} | ({"run_0": {n: x[None] for n, x in arrays.items()}} if arrays else {})
        scorer = make(one)
        if scorer.needs == "gradients":
            raise ValueError("sequential: the scorer needs gradients of the loss of a whole model; give one of activations")
        (found,) = scorers.score(scorer, alone, probes(one), ids)
        out.append(found)
        gates = gates_of(select((found,), (widths[layer],)), one)["gates"][0]
        p = layer_of(params, run, i)
        p |= {
            OUTPUT[a]: p[OUTPUT[a]] * gates[a].astype(stream.dtype).reshape(-1, *[1] * (p[OUTPUT[a]].ndim - 1)) for a in found
        }
        stream = np.concatenate([on_host(_after(p, x, one)) for x in np.split(stream, len(batches))])
    return tuple(out)


def _alone(cfg: LlamaConfig, layer: int, tokens: int) -> LlamaConfig:
    """The model of one layer, whose embedding is the residual stream of so many tokens."""
    own = slice(layer, layer + 1)
    one = dataclasses.replace(cfg, layers=cfg.layers[own], windowed=cfg.windowed[own])
    return dataclasses.replace(one, vocab=tokens, tie_embeddings=True, embed_scale=None)


@functools.partial(jax.jit, static_argnames="cfg")
def _after(p, x, cfg):
    for name in OUTPUT.values():
        x = sublayer(p, name, x, cfg)
    return x
