"""Figures of what was kept, what it cost and how it recovered."""

import typing
from collections.abc import Mapping

import numpy as np
from jaxtyping import ArrayLike, Float

from jaxprune import _plot
from jaxprune._metrics import Stages, rows
from jaxprune.models import LlamaConfig

if typing.TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

WIDTHS = ("KV groups", "query heads in a group", "MLP channels")  # the fields of LayerDims


def widths_figure(dense_cfg: LlamaConfig, pruned_cfg: LlamaConfig) -> "matplotlib.figure.Figure":
    """Widths that were kept in each layer, with those of the dense model as outlines.

    Args:
      dense_cfg: the model before pruning.
      pruned_cfg: the model after it, with as many layers.

    Raises:
      ValueError: the numbers of layers differ.
    """
    before, after = (np.array([dims.widths for dims in cfg.layers]) for cfg in (dense_cfg, pruned_cfg))
    if len(before) != len(after):
        raise ValueError(f"widths: {len(before)} dense and {len(after)} pruned layers given; they must be as many")
    alive = after[:, 0] > 0
    panels = [i for i in (0, 1, 2) if before[:, i].any() and (i != 1 or (before[alive, 1] != after[alive, 1]).any())]
    figure, axes = _plot.grid(len(panels), 1, width=8.5, height=2.5)
    for ax, i in zip(axes, panels, strict=True):
        _widths_panel(ax, before[:, i], after[:, i])
        total = f": {after[:, i].sum():,} of {before[:, i].sum():,} kept ({after[:, i].sum() / before[:, i].sum():.1%})"
        _plot.label(ax, WIDTHS[i] + ("" if i == 1 else total), y=WIDTHS[i])
    _plot.layers(axes, len(before))
    gone = ((after == 0) & (before > 0)).any()
    _plot.legend(axes[0], ["dense", "kept", "all removed"] if gone else ["dense", "kept"])
    if pruned_cfg.d != dense_cfg.d:
        figure.suptitle(f"residual width: {pruned_cfg.d} of {dense_cfg.d} channels kept", fontsize=10, x=0.01, ha="left")
    return figure


def _widths_panel(ax: "matplotlib.axes.Axes", before: np.ndarray, after: np.ndarray) -> None:
    from matplotlib.ticker import MaxNLocator

    at = np.arange(len(before))
    gone = at[(before > 0) & (after == 0)]
    ax.bar(at, after, 0.8, color=_plot.BLUE, label="kept")
    ax.bar(at, before, 0.8, fill=False, edgecolor=_plot.DARK, linewidth=0.8, label="dense")
    ax.plot(gone, np.full(gone.size, 0.05 * before.max()), "x", color=_plot.ORANGE, markersize=5, label="all removed")
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def before_after_figure(stages: Stages) -> "matplotlib.figure.Figure":
    """Each measured number before and after pruning and recovery: one panel a number, the first stage as a dashed line.

    An infinite value is drawn a little higher than the largest finite one.

    Args:
      stages: name -> metrics, as in `results["stages"]`. Numbers that only one stage has, or that say how it was measured, are
        left out.

    Raises:
      ValueError: no number was measured in two stages.
    """
    panels = [row for row in rows(stages) if len(row.values) > 1 and not row.metric.setting]
    if not panels:
        raise ValueError(f"before and after: no number was measured in two of the stages {list(stages)}; measure two")
    colours = dict(zip(stages, [_plot.GREY, _plot.ORANGE, _plot.BLUE, _plot.GREEN, _plot.DARK], strict=False))
    columns = min(4, len(panels))
    figure, axes = _plot.grid(len(panels), columns, width=2.6 * columns, height=2.4)
    for ax, row in zip(axes, panels, strict=True):
        there = [name for name in stages if name in row.values]
        shown = np.array([row.values[name] / row.metric.scale for name in there])
        top = max([*shown[np.isfinite(shown)], 1e-9])
        heights = np.nan_to_num(shown, nan=0, posinf=1.1 * top)
        ax.axhline(heights[0], color=_plot.DARK, linewidth=0.8, linestyle=(0, (4, 3)))
        bars = ax.bar(there, heights, 0.65, color=[colours.get(name, _plot.GREY) for name in there], zorder=2)
        labels = ax.bar_label(bars, [row.shown(name) for name in there], fontsize=8, padding=3, zorder=3)
        for text in labels:
            text.set_bbox(dict(facecolor="white", edgecolor="none", pad=0.8))
        ax.set_ylim(0, 1.2 * heights.max() or 1)
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        _plot.label(ax, row.metric.label)
    return figure


def loss_figure(
    losses: Float[ArrayLike, " steps"], *, validation: Mapping[int, float] | None = None, smooth: int = 20
) -> "matplotlib.figure.Figure":
    """The loss of recovery over its steps, as it was and as a running mean.

    Args:
      losses: of the batch of each step, in nats a token, as `recovery.train.fit` returns them.
      validation: steps done -> loss on held-out data, where it was measured.
      smooth: steps that the running mean goes over; it is left out of short histories.

    Raises:
      ValueError: there are no losses.
    """
    losses = np.asarray(losses, np.float64)
    if not losses.size:
        raise ValueError("loss: no steps given; at least one is needed")
    from matplotlib.ticker import MaxNLocator

    figure, (ax,) = _plot.grid(1, 1, width=8.5, height=3.0)
    steps = np.arange(1, losses.size + 1)
    if losses.size < 2 * smooth:
        ax.plot(steps, losses, "o-", color=_plot.BLUE, linewidth=1, markersize=3, label="batch")
    else:
        ax.plot(steps, losses, color=_plot.BLUE, alpha=0.3, linewidth=1, label="batch")
        mean = np.convolve(losses, np.full(smooth, 1 / smooth), "valid")
        ax.plot(steps[smooth - 1 :], mean, color=_plot.BLUE, linewidth=1.8, label=f"mean of the last {smooth} steps")
    if validation:
        ax.plot(
            *zip(*validation.items(), strict=True), "o-", color=_plot.ORANGE, markersize=4, linewidth=1.2, label="validation"
        )
    _plot.label(ax, "Loss of recovery", "optimiser step", "loss (nats per token)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _plot.legend(ax)
    return figure
