"""What all figures share. Colours are those of Okabe and Ito, which colour-blind readers can tell apart."""

import io
import typing

if typing.TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

BLUE, ORANGE, GREEN, GREY, DARK = "#0072B2", "#D55E00", "#009E73", "#BBBBBB", "#333333"


def grid(
    n: int, columns: int, *, width: float, height: float
) -> tuple["matplotlib.figure.Figure", list["matplotlib.axes.Axes"]]:
    """A figure with `n` panels.

    Args:
      n: panels.
      columns: panels in a row.
      width: of the figure, in inches.
      height: of a row, in inches.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = -(-n // columns)
    figure = Figure(figsize=(width, height * rows), dpi=150, layout=ConstrainedLayoutEngine(hspace=0.06, wspace=0.06))
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(n)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#E5E5E5", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=8)
    return figure, axes


def label(ax: "matplotlib.axes.Axes", title: str, x: str = "", y: str = "") -> None:
    """Names a panel and its axes."""
    ax.set_title(title, fontsize=10, loc="left")
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)


def layers(axes: list["matplotlib.axes.Axes"], n: int) -> None:
    """Makes the x axes count decoder layers 0 to n - 1."""
    from matplotlib.ticker import MaxNLocator

    for ax in axes:
        ax.set_xlim(-0.7, n - 0.3)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
    axes[-1].set_xlabel("decoder layer", fontsize=9)


def legend(ax: "matplotlib.axes.Axes", names: list[str] | None = None, *, opaque: bool = False) -> None:
    """A legend above the right end of a panel.

    Args:
      ax: the panel.
      names: labels to show, in this order; None is all.
      opaque: show transparent markers in full colour.
    """
    handles = {text: handle for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    names = list(handles) if names is None else names
    box = ax.legend(
        [handles[name] for name in names], names, fontsize=8, ncols=len(names), frameon=False, loc="lower right",
        bbox_to_anchor=(1, 1), borderaxespad=0.2,
    )  # fmt: skip
    for handle in box.legend_handles:
        if opaque and handle is not None:
            handle.set_alpha(1)


def png(figure: "matplotlib.figure.Figure") -> bytes:
    """The figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
