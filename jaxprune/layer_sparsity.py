"""How sparse each layer becomes: by the outliers among its scores (OWL), or by what its zeros alone cost."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxprune import _layer_statistics as statistics
from jaxprune._curves import Item, choose
from jaxprune._losses import Progress
from jaxprune._sparsity import size
from jaxprune.models import Config, Params

HOW = ("outliers", "sensitivity")
STEPS = 64  # between the least and the most that a layer may lose, for the knapsack


def allocated(
    params: Params,
    cfg: Config,
    batches: Sequence[Any],
    names: Sequence[Sequence[str]],
    how: str,
    fraction: float,
    spread: float = 0.08,
    *,
    progress: Progress | None = None,
) -> tuple[float, ...]:
    """The fraction of zeros of each layer, from one pass of the dense model over calibration tokens; see the two rules below.

    Args:
      params, cfg: the dense model.
      batches: int32[b, t] arrays of calibration tokens; `sensitivity` measures on the first.
      names: the matrices of each layer that will be sparse, as `sparsify.chosen` returns them.
      how: `outliers` or `sensitivity`.
      fraction: of zeros in all of these matrices together.
      spread: how far from it a layer may be.
      progress: wraps the sequences of layers; called with each and a description.

    Returns:
      Numbers for `sparsify.Sparsity(layers=...)`. A layer without matrices has one, too, which counts for nothing.

    Raises:
      ValueError: an unknown rule, no batches, or a spread that takes a layer to 0 or 1.

    >>> import jax
    >>> from jaxprune import layer_sparsity, models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 2)
    >>> params, tokens = models.init(jax.random.key(0), cfg), jax.numpy.arange(60).reshape(2, 30)
    >>> found = layer_sparsity.allocated(params, cfg, [tokens], [("q", "down")] * 2, "sensitivity", 0.5)
    >>> round(sum(found) / 2, 6), all(0.42 <= x <= 0.58 for x in found)
    (0.5, True)
    """
    if how not in HOW:
        raise ValueError(f"layerwise: {how!r} given; allowed are {', '.join(HOW)}")
    if not batches:
        raise ValueError("batches: none given; sparsity by layers needs at least one batch of calibration tokens")
    low, high = bounds(fraction, spread)
    norms = statistics.input_norms(params, cfg, batches, progress)
    weights = [sum(size(cfg, i, n) for n in here) for i, here in enumerate(names)]
    if how == "outliers":
        return by_outliers(statistics.outlier_shares(params, cfg, norms, names), weights, fraction, spread)
    points = (low, fraction, high)
    losses = statistics.divergences(params, cfg, norms, names, batches[0], points, progress)
    return by_losses(losses, points, weights, fraction)


def bounds(fraction: float, spread: float) -> tuple[float, float]:
    """The least and the most that a layer may lose.

    Raises:
      ValueError: the spread is not positive or takes a layer to 0 or 1.
    """
    if not (spread > 0 and 0 < fraction - spread and fraction + spread < 1):
        most = min(fraction, 1 - fraction)
        raise ValueError(f"spread: {spread:g} given; with sparsity {fraction:g} it must be between 0 and {most:g}")
    return fraction - spread, fraction + spread


def by_outliers(shares: Sequence[float], weights: Sequence[int], fraction: float, spread: float = 0.08) -> tuple[float, ...]:
    r"""OWL: the more outliers a layer has, the more of it stays.

    .. math:: s_l = \mathrm{clip}\Big(c - 2 \lambda \frac{D_l - \min D}{\max D - \min D}, \; S - \lambda, \; S + \lambda\Big)

    with `c` such that the zeros of all layers are the fraction `S` of their weights.

    Args:
      shares: D, per layer the fraction of weights that are outliers, see `_layer_statistics.outlier_shares`.
      weights: of each layer that can become zero.
      fraction: S.
      spread: lambda.

    Reference: Yin et al., `Outlier Weighed Layerwise Sparsity <https://arxiv.org/abs/2310.05175>`_, 2023, section 3.2. The
    released code has the same line without the bounds, which a layer with far more outliers than the others then leaves, and
    with the mean over layers instead of weights.

    >>> from jaxprune import layer_sparsity
    >>> layer_sparsity.by_outliers([0.0, 0.01, 0.02], [100, 100, 100], 0.7)
    (0.78, 0.7, 0.62)
    """
    low, high = bounds(fraction, spread)
    there = np.asarray(weights) > 0
    d = np.where(there, np.asarray(shares, np.float64), np.min(np.asarray(shares)[there]))
    wide = float(np.ptp(d))
    return _met(-2 * spread * (d - d.min()) / wide if wide > 0 else 0 * d, weights, fraction, low, high)


def by_losses(losses: Any, points: Sequence[float], weights: Sequence[int], fraction: float) -> tuple[float, ...]:
    r"""The least sum of the losses of all layers, each as if the others were dense.

    Args:
      losses: of each layer at each point, positive, [layers, points]; the logarithm is linear between points.
      points: fractions of zeros, ascending; no layer leaves them.
      weights: of each layer that can become zero.
      fraction: of zeros in all layers together.

    Reference: ours; the knapsack is `allocate.lagrangian`'s.

    >>> from jaxprune import layer_sparsity
    >>> found = layer_sparsity.by_losses([[0.1, 0.2, 0.4], [0.2, 0.4, 0.8]], (0.4, 0.5, 0.6), [100, 100], 0.5)
    >>> found[0] > 0.5 > found[1], round(sum(found), 6)
    (True, 1.0)
    """
    grid = np.linspace(points[0], points[-1], STEPS + 1)
    logs = np.log(np.maximum(np.maximum.accumulate(np.asarray(losses, np.float64), 1), 1e-12))
    curves = [np.exp(np.interp(grid, points, row)) for row in logs]
    steps = np.arange(STEPS + 1)
    items = [Item(i, "", steps, c, (grid - grid[0]) * n) for i, (c, n) in enumerate(zip(curves, weights, strict=True)) if n]
    choose(items, (fraction - grid[0]) * sum(weights))
    wanted = np.full(len(weights), fraction)
    for item in items:
        wanted[item.layer] = grid[item.chosen]
    return _met(wanted, weights, fraction, points[0], points[-1])


def _met(wanted: np.ndarray, weights: Sequence[int], fraction: float, low: float, high: float) -> tuple[float, ...]:
    """What was wanted, shifted by one number and cut off at the bounds, so that the mean over all weights is the fraction."""
    below, above = low - wanted.max(), high - wanted.min()
    for _ in range(100):
        middle = (below + above) / 2
        mean = np.average(np.clip(wanted + middle, low, high), weights=weights)
        below, above = (middle, above) if mean < fraction else (below, middle)
    return tuple(float(x) for x in np.clip(wanted + above, low, high).round(12))
