"""Measured curves of loss against width: what narrowing one sublayer costs, by gates, with one compilation for all."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._losses import Progress
from jaxprune.models import LlamaConfig, Params, PerLayer, loss_fn, probes

FRACTIONS = (0.125, 0.25, 0.5, 0.75)


def curves(
    params: Params,
    cfg: LlamaConfig,
    scores: PerLayer,
    tokens: Any,
    *,
    fractions: tuple[float, ...] = FRACTIONS,
    progress: Progress | None = None,
) -> PerLayer:
    r"""The loss that each sublayer loses at each of its widths, as scores in the order of the given ones.

    For a sublayer and a fraction of its units, the lowest-scored ones are gated off and the loss is measured; between the
    fractions the curve is linear, and it never falls. What units lose jointly across sublayers is not seen.

    Args:
      params, cfg: the model.
      scores: per layer, axis letter -> float32[units], which say in what order units go.
      tokens: int32[b, t] that the loss is measured on.
      fractions: of a sublayer's units; all of them are always measured too.
      progress: wraps the sequence of sublayers; called with it and a description.

    Returns:
      Per layer, axis letter -> float32[units] in nats a token: the loss when this unit and all with lower scores are gone.
      `allocate.lagrangian` reads it.

    Raises:
      ValueError: a fraction outside (0, 1).

    >>> import jax
    >>> from jaxprune import models, sensitivity
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> params, tokens = models.init(jax.random.key(0), cfg), jax.numpy.arange(12).reshape(2, 6)
    >>> flat = ({"k": jax.numpy.arange(2.0), "f": jax.numpy.arange(48.0)},)
    >>> found = sensitivity.curves(params, cfg, flat, tokens)[0]["f"]
    >>> found.shape, bool((found[1:] >= found[:-1]).all())
    ((48,), True)
    """
    if not all(0 < f < 1 for f in fractions):
        raise ValueError(f"fractions: {fractions} given; each must lie between 0 and 1")
    full = probes(cfg)["gates"]
    measure = functools.partial(_loss, params, cfg=cfg, tokens=jnp.asarray(tokens))
    dense = float(measure(full))
    items = [(i, a) for i, layer in enumerate(full) for a in layer]
    out: list[dict[str, Any]] = [{} for _ in full]
    for i, a in items if progress is None else progress(items, "measuring sensitivity"):
        n = len(full[i][a])
        order = np.argsort(np.asarray(scores[i][a]), kind="stable")
        counts, losses = [0], [0.0]
        for count in sorted({round(f * n) for f in fractions} - {0} | {n}):
            gate = full[i][a].at[order[:count]].set(0)
            gated = tuple(layer | {a: gate} if j == i else layer for j, layer in enumerate(full))
            counts.append(count)
            losses.append(max(float(measure(gated)) - dense, losses[-1]))
        curve = np.interp(np.arange(1, n + 1), counts, losses)
        out[i][a] = jnp.zeros(n, jnp.float32).at[order].set(jnp.asarray(curve, jnp.float32))
    return tuple(out)


@functools.partial(jax.jit, static_argnames="cfg")
def _loss(params, gates, *, cfg, tokens):
    return loss_fn(cfg, remat=False)(params, {"gates": gates}, tokens).mean()
