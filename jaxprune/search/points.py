"""What a search found: candidates with their losses and sizes, the front of those that no other beats, file and figure."""

import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxprune import _plot
from jaxprune._files import atomic_bytes, atomic_text
from jaxprune._json import write_json
from jaxprune.plan import Plan

if typing.TYPE_CHECKING:
    import matplotlib.figure


class Point(NamedTuple):
    """A candidate.

    Attributes:
      loss: on the fitness text, nats a token.
      cost: what the search calls size: parameters of the attention and MLP matrices, or what the budget is in.
      plan: what it keeps; None where that is not needed any more, and of the dense model.
      origin: where it comes from, in a few words; `dense` is the model before pruning.
    """

    loss: float
    cost: float
    plan: Plan | None
    origin: str


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in loss at the same or a lower cost, by ascending cost.

    >>> from jaxprune.search import points
    >>> some = [points.Point(2.0, 5, None, "a"), points.Point(1.0, 5, None, "b"), points.Point(3.0, 4, None, "c")]
    >>> [p.origin for p in points.front([*some, points.Point(1.5, 6, None, "d")])]
    ['c', 'b']
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.loss)):
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return best


def rows(points: Sequence[Point], unit: str) -> list[dict[str, Any]]:
    """Points as rows of a table."""
    return [{"loss": round(p.loss, 4), unit: round(p.cost), "origin": p.origin} for p in points]


def write(folder: Path, points: Sequence[Point], unit: str, details: dict[str, Any]) -> None:
    """Writes pareto.json, pareto.png and a plan for each point of the front, each file whole or not at all.

    `pareto.json` has every point: `loss`, the cost, `origin`, `front`, and for those on the front `plan`, the name of the file
    that `jaxprune prune --plan` turns into a model.

    Args:
      folder: is there.
      points: all candidates, and the dense model.
      unit: of the cost.
      details: what else the file should say.
    """
    on_front = front(points)
    names = {id(p): f"plan-{i}.json" for i, p in enumerate(on_front) if p.plan is not None}
    for point in on_front:
        if point.plan is not None:
            atomic_text(folder / names[id(point)], point.plan.to_json() + "\n")
    described = []
    for p in sorted(points, key=lambda p: (p.cost, p.loss)):
        plan = {"plan": names[id(p)]} if id(p) in names else {}
        described.append({"loss": p.loss, unit: p.cost, "origin": p.origin, "front": id(p) in map(id, on_front)} | plan)
    write_json(folder / "pareto.json", details | {"unit": unit, "points": described})
    atomic_bytes(folder / "pareto.png", _plot.png(pareto_figure(points, unit)))


def pareto_figure(points: Sequence[Point], unit: str) -> "matplotlib.figure.Figure":
    """Loss against size: every candidate a point, the front a line, the dense model marked."""
    from matplotlib.ticker import EngFormatter

    figure, (ax,) = _plot.grid(1, 1, width=7.0, height=4.2)
    found, on_front = [p for p in points if p.origin != "dense"], front(points)
    ax.plot(
        [p.cost for p in found], [p.loss for p in found], "o", markersize=4, color=_plot.BLUE, alpha=0.35, label="candidates"
    )
    x, y = [p.cost for p in on_front], [p.loss for p in on_front]
    ax.plot(x, y, "o-", color=_plot.ORANGE, linewidth=1.4, markersize=4, label="front")
    for p in points:
        if p.origin == "dense":
            ax.plot([p.cost], [p.loss], "*", markersize=12, color=_plot.DARK, label="dense")
    ax.xaxis.set_major_formatter(EngFormatter())
    _plot.label(ax, "candidates of the search", unit, "loss on the fitness text, nats a token")
    _plot.legend(ax, opaque=True)
    return figure
