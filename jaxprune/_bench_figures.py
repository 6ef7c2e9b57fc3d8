"""Figures of `jaxprune bench`: what size and time cost in quality, readable with many methods."""

import itertools
import typing
from collections.abc import Sequence

import numpy as np

from jaxprune import _plot
from jaxprune._bench_table import Row, perplexity_column

if typing.TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.axis
    import matplotlib.figure

COLOURS = (_plot.BLUE, _plot.ORANGE, _plot.GREEN, "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "os^DvP*X<>h"  # as many as have no divisor in common with the colours: 77 pairs
CEILING = 100  # times the dense perplexity: what is above has failed, by how much is left to the tables


def quality_size_figure(rows: Sequence[Row]) -> "matplotlib.figure.Figure":
    """Perplexity against the decoder parameters that are kept, one curve a method, from the dense model on.

    Args:
      rows: see `_bench_table.rows`. Rows that failed are left out.
    """
    quality, dense, curves = _curves(rows)
    figure, (ax,) = _plot.grid(1, 1, width=8.5, height=max(4.0, 0.24 * len(curves) + 1))
    top = CEILING * dense[quality]
    ends = []
    for name, points in curves.items():
        kept = [100 * (1 - row["fraction removed"]) for row in [dense, *points]]
        height = np.minimum([row[quality] for row in [dense, *points]], top)
        ax.plot(kept, height, linewidth=1.3, **_style(rows, name))
        ends.append((name, kept[-1], height[-1]))
    ends.sort(key=lambda end: (end[2], curves[end[0]][-1][quality]))
    ax.plot(100, dense[quality], "o", color=_plot.DARK, markersize=7, zorder=4)
    ax.axhline(dense[quality], color=_plot.DARK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    ax.invert_xaxis()
    _logarithmic(ax, ax.yaxis, [dense[quality], *(height for *_, height in ends)])
    _names(ax, rows, ends)
    _plot.label(ax, f"Perplexity and size{_cut_off(rows, quality, top)}", "decoder parameters kept, not zero (%)", quality)
    return figure


def seconds_quality_figure(rows: Sequence[Row]) -> "matplotlib.figure.Figure":
    """Perplexity against the seconds of scoring and cutting, one marker a method, one panel a ratio.

    Args:
      rows: see `_bench_table.rows`. Rows that failed are left out.
    """
    quality, dense, curves = _curves(rows)
    ratios = sorted({row["ratio"] for points in curves.values() for row in points})
    columns = max(1, min(2, len(ratios)))
    high = max(3.6, (0.19 * len(curves) + 0.6) / -(-max(1, len(ratios)) // columns))
    figure, axes = _plot.grid(max(1, len(ratios)), columns, width=4.2 * columns + 2, height=high)
    top = CEILING * dense[quality]
    handles = {}
    for ax, ratio in zip(axes, ratios, strict=False):
        there = {name: row for name, points in curves.items() for row in points if row["ratio"] == ratio}
        for name, row in there.items():
            style = _style(rows, name) | dict(linestyle="none", markersize=7)
            (handles[name],) = ax.plot(row["seconds"], min(row[quality], top), **style)
        handles["dense"] = ax.axhline(dense[quality], color=_plot.DARK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        _logarithmic(ax, ax.yaxis, [dense[quality], *(min(row[quality], top) for row in there.values())])
        _logarithmic(ax, ax.xaxis, [row["seconds"] for row in there.values()])
        cut_off = _cut_off(list(there.values()), quality, top)
        _plot.label(ax, f"ratio {ratio}{cut_off}", "seconds of scoring and cutting", quality)
    names = [name for name in [*curves, "dense"] if name in handles]
    figure.legend([handles[name] for name in names], names, loc="outside right center", fontsize=8, frameon=False)
    return figure


FIGURES = dict(quality_size=quality_size_figure, seconds_quality=seconds_quality_figure)


def _curves(rows: Sequence[Row]) -> tuple[str, Row, dict[str, list[Row]]]:
    """The column to draw, the dense row, and the rows of each method that has any, from the largest model to the smallest."""
    quality = perplexity_column(rows)
    dense, *others = (row for row in rows if quality in row)
    found: dict[str, list[Row]] = {row["method"]: [] for row in others}
    for row in sorted(others, key=lambda row: row["fraction removed"]):
        found[row["method"]].append(row)
    return quality, dense, found


def _style(rows: Sequence[Row], name: str) -> dict:
    """A method looks the same in all figures; `random`, which all are compared with, is grey."""
    if name == "random":
        return dict(color="#888888", marker="o", markersize=5, linestyle=(0, (2, 2)), zorder=2)
    names = dict.fromkeys(row["method"] for row in rows[1:] if row["method"] != "random")
    i = list(names).index(name)
    colour, marker = next(itertools.islice(zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS)), i, None))
    return dict(color=colour, marker=marker, markersize=5, linestyle=("-", "--", ":")[i // len(COLOURS) % 3], zorder=3)


def _cut_off(rows: Sequence[Row], quality: str, top: float) -> str:
    above = any(row.get(quality, 0) > top for row in rows)
    return f" (drawn at {top:,.4g} where it is higher)" if above else ""


def _logarithmic(ax: "matplotlib.axes.Axes", axis: "matplotlib.axis.Axis", values: Sequence[float]) -> None:
    """A logarithmic axis with a margin and plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if not values:
        return
    low, high = min(values), max(values)
    room = max(high / low, 1.2) ** 0.06
    scale, limit = (ax.set_yscale, ax.set_ylim) if axis is ax.yaxis else (ax.set_xscale, ax.set_xlim)
    scale("log")
    limit(low / room, high * room)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axis.set_minor_formatter(NullFormatter())


def _names(ax: "matplotlib.axes.Axes", rows: Sequence[Row], ends: list[tuple[str, float, float]]) -> None:
    """The name of each curve beside the panel, from the lowest end to the highest, as near to its end as the others allow."""
    from scipy.optimize import isotonic_regression

    if not ends:
        return
    low, high = np.log(ax.get_ylim())
    wanted = np.array([(np.log(height) - low) / (high - low) for *_, height in ends])
    shift = np.arange(len(ends)) / max(20, len(ends) + 1)  # so that names in order of their height are this far apart
    for (name, x, y), place in zip(ends, isotonic_regression(wanted - shift).x + shift, strict=True):
        line = dict(arrowstyle="-", color=_style(rows, name)["color"], linewidth=0.7, shrinkA=2, shrinkB=4, relpos=(0, 0.5))
        ax.annotate(
            name, (x, y), (1.06, place), textcoords="axes fraction", fontsize=8, va="center", arrowprops=line,
            annotation_clip=False,
        )  # fmt: skip
