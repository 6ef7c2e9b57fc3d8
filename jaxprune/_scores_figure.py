"""The figure of scores and the cut through them."""

import typing
from collections.abc import Iterator

import numpy as np

from jaxprune import _plot
from jaxprune.models import PerLayer

if typing.TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

UNITS = dict(k="KV groups", f="MLP channels", d="residual channels", l="layers")
POINTS = 256


def scores_figure(scores: PerLayer, keep: PerLayer) -> "matplotlib.figure.Figure":
    """The scores of all units, layer by layer, and where the cut went through.

    The score axis is logarithmic, and linear around 0 if there are scores of 0 or less. At most 256 units of a layer are drawn,
    evenly spaced in rank; infinite scores are left out.

    Args:
      scores: per layer, axis letter -> float[units].
      keep: per layer, axis letter -> indices of the kept units (`plan.keep`); an absent letter keeps all.

    Raises:
      ValueError: the numbers of layers differ, or there are no scores.
    """
    letters = list(dict.fromkeys(letter for layer in scores for letter in layer))
    if len(scores) != len(keep) or not letters:
        raise ValueError(
            f"scores: of {len(scores)} layers and units {letters}, plan of {len(keep)} layers; give the same layers"
        )
    figure, axes = _plot.grid(len(letters), 1, width=8.5, height=3.2)
    for ax, letter in zip(axes, letters, strict=True):
        _panel(ax, [layer.get(letter) for layer in scores], [layer.get(letter) for layer in keep])
        _plot.label(ax, UNITS.get(letter, letter), y="score")
    _plot.layers(axes, len(scores))
    _plot.legend(axes[0], opaque=True)
    return figure


def _panel(ax: "matplotlib.axes.Axes", scores: list, keep: list) -> None:
    points: list[tuple[float, float, bool]] = []
    cuts: list[tuple[int, float]] = []
    for i, (x, kept) in enumerate(zip(scores, keep, strict=True)):
        if x is None:
            continue
        x = np.asarray(x, float)
        stays = np.ones(x.size, bool) if kept is None else np.isin(np.arange(x.size), kept)
        points.extend((i + place, value, stay) for place, value, stay in _sample(x, stays))
        if stays.any() and not stays.all():
            cuts.append((i, x[stays].min()))
    at, values, stays = np.array(points, np.float64).reshape(-1, 3).T
    _scale(ax, values)
    size = 5 if values.size > 20 * len(scores) else 22
    for name, colour, which in (("kept", _plot.BLUE, stays == 1), ("removed", _plot.ORANGE, stays == 0)):
        ax.scatter(at[which], values[which], s=size, color=colour, linewidths=0, alpha=0.6, label=name)
    where = np.array(cuts, np.float64).reshape(-1, 2)
    ax.hlines(where[:, 1], where[:, 0] - 0.45, where[:, 0] + 0.45, _plot.DARK, linewidth=1.2, label="lowest kept score")


def _scale(ax: "matplotlib.axes.Axes", values: np.ndarray) -> None:
    if (values > 0).all() and values.size:
        ax.set_yscale("log")
    elif (values != 0).any():
        small = np.quantile(np.abs(values[values != 0]), 0.25)
        ax.set_yscale("symlog", linthresh=float(10 ** np.ceil(np.log10(small))))


def _sample(x: np.ndarray, stays: np.ndarray) -> Iterator[tuple[float, float, bool]]:
    """(place across the layer, score, kept) of the units that are drawn."""
    order = np.argsort(x)
    order = order[np.isfinite(x[order])]
    if order.size > POINTS:
        order = order[np.linspace(0, order.size - 1, POINTS).astype(int)]
    spread = 0.8 if order.size > 8 else 0.0
    places = (np.arange(order.size) * (np.sqrt(5) - 1) / 2 % 1 - 0.5) * spread  # the golden ratio spreads them without chance
    return zip(places, x[order], stays[order], strict=True)
