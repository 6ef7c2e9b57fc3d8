"""Runs of layers: what is stacked and scanned together."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple


class Run(NamedTuple):
    """Consecutive layers of equal shape: one stacked array per weight, one `lax.scan`."""

    name: str
    start: int
    length: int
    dims: Any
    windowed: tuple[bool, ...] = ()  # of its layers, where the model has two kinds


def places(runs: Sequence[Run]) -> list[tuple[Run, int]]:
    """The run of each layer and the layer's place in it, in order."""
    return [(run, i) for run in runs for i in range(run.length)]


def runs_of(layers: tuple[Any, ...], windowed: tuple[bool, ...] = ()) -> tuple[Run, ...]:
    """Consecutive layers of equal widths, in order."""
    out, start = [], 0
    for i, (dims, group) in enumerate(itertools.groupby(layers)):
        length = len(list(group))
        out.append(Run(f"run_{i}", start, length, dims, windowed[start : start + length]))
        start += length
    return tuple(out)
