"""How measured numbers are named and written in tables and figures."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

Stages = Mapping[str, Mapping[str, Any]]


class Metric(NamedTuple):
    """How one measured number is shown.

    Attributes:
      label: its name with the unit.
      scale: shown = measured / scale.
      digits: after the decimal point.
      setting: it says how something was measured, and is not a result.
    """

    label: str
    scale: float = 1.0
    digits: int = 2
    setting: bool = False


class Row(NamedTuple):
    """One metric over all stages: `values[stage]` as measured, missing ones absent."""

    metric: Metric
    values: dict[str, float]

    def shown(self, stage: str) -> str:
        """The value of a stage as text, empty if it was not measured."""
        value = self.values.get(stage)
        return "" if value is None else f"{value / self.metric.scale:,.{self.metric.digits}f}"

    def change(self, stage: str, base: str) -> str:
        """How the value of a stage differs from that of another, in per cent or, for percentages, in points; or empty."""
        value, reference = self.values.get(stage), self.values.get(base)
        if stage == base or value is None or not reference:
            return ""
        if self.metric.scale == 0.01:
            return f"{100 * (value - reference):+.1f} points"
        return f"{100 * (value / reference - 1):+.1f} %"


METRICS = dict(
    perplexity=Metric("perplexity"),
    parameters=Metric("parameters (million)", 1e6),
    total_parameters=Metric("parameters (million)", 1e6),
    decoder_parameters=Metric("decoder parameters (million)", 1e6),
    bytes=Metric("size (MB)", 1e6, 1),
    flops_per_token=Metric("MFLOPs per token", 1e6, 1),
    prefill_tokens_per_second=Metric("prefill (tokens/s)", digits=0),
    decode_tokens_per_second=Metric("decode (tokens/s)", digits=1),
    accuracy=Metric("accuracy (%)", 0.01, 1),
    accuracy_normalised=Metric("accuracy, normalised (%)", 0.01, 1),
    tokens=Metric("tokens", digits=0, setting=True),
    window=Metric("window (tokens)", digits=0, setting=True),
    context=Metric("context (tokens)", digits=0, setting=True),
    prompt_tokens=Metric("prompt (tokens)", digits=0, setting=True),
    new_tokens=Metric("new tokens", digits=0, setting=True),
    items=Metric("questions", digits=0, setting=True),
)


def rows(stages: Stages) -> list[Row]:
    """The numbers of all stages, metric by metric, in the order in which they first appear.

    Args:
      stages: name -> metrics; a metric is a number or a mapping of numbers, e.g. one perplexity a window. What is not a
        number is left out.

    >>> stages = {"dense": {"perplexity": {"1024": 21.16}}, "pruned": {"perplexity": {"1024": 35.0}, "bytes": 2e8}}
    >>> for row in rows(stages):
    ...     print([row.metric.label, row.shown("dense"), row.shown("pruned"), row.change("pruned", "dense")])
    ['perplexity, 1024', '21.16', '35.00', '+65.4 %']
    ['size (MB)', '', '200.0', '']
    """
    table: dict[tuple[str, ...], dict[str, float]] = {}
    for stage, metrics in stages.items():
        for path, value in _numbers(metrics):
            table.setdefault(path, {})[stage] = value
    return [Row(_metric(path), values) for path, values in table.items()]


def _numbers(metrics: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, (*path, str(key)))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield (*path, str(key)), float(value)


def _metric(path: tuple[str, ...]) -> Metric:
    known = next((key for key in path if key in METRICS), None)
    metric = METRICS[known] if known else Metric(path[-1].replace("_", " "))
    rest = [part.replace("_", " ") for part in path if part != (known or path[-1])]
    return metric._replace(label=", ".join([metric.label, *rest]))
