"""The cells of `jaxprune bench` as flat rows, and rows as CSV and as Markdown."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, Any]  # column -> number or text; what is not known is absent

MEASURED = dict(  # key of the metrics -> column
    decoder_parameters="decoder parameters",
    parameters="all parameters",
    accuracy="accuracy",
    accuracy_normalised="accuracy, normalised",
    prefill_tokens_per_second="prefill, tokens/s",
    decode_tokens_per_second="decode, tokens/s",
)
FORMATS = {
    "fraction removed": ".1%",
    "accuracy": ".1%",
    "accuracy, normalised": ".1%",
    "decode, tokens/s": ",.1f",
    "error": ".2f",
    "seconds": ".1f",
}
LEGEND = (
    "`decoder parameters` are those of the attention and MLP matrices, and `fraction removed` is of them; in a sparse model "
    "they are zero instead, and `error` is the relative squared error of the outputs of its matrices, summed. `seconds` are "
    "those of scoring and cutting on the clock, compilation included, loading and evaluation not. `peak memory` is the "
    "largest resident size of the cell's process until the cut is made: Python, JAX, loading, scoring and cutting, without "
    "evaluation and without the memory of an accelerator; for the dense model it is that of loading. `worse than random`: "
    "random units gave a lower perplexity at this ratio, which is a bug until shown otherwise."
)


def rows(cells: Iterable[Mapping[str, Any]]) -> list[Row]:
    """One flat row a cell, the dense model first; `note` says what failed, what lost to `random` and what missed its ratio."""
    found = [_row(cell) for cell in cells]
    quality = perplexity_column(found)
    random = {row["ratio"]: row[quality] for row in found if row["method"] == "random" and quality in row}
    for row in found:
        if row.get(quality, 0) > random.get(row["ratio"], float("inf")):
            row["note"] = "; ".join(["worse than random", *filter(None, [row["note"]])])
    return found


def perplexity_column(rows: Sequence[Row]) -> str:
    """The column of the first window."""
    return next(column for row in rows for column in row if column.startswith("perplexity"))


def _row(cell: Mapping[str, Any]) -> Row:
    head = dict(method=cell["method"], ratio=cell["ratio"])
    if "failed" in cell:
        return head | dict(note=f"failed: {cell['failed']}")
    metrics = cell["metrics"]
    windows = {f"perplexity at {metrics['window']}": metrics["perplexity"]}
    windows |= {key.replace("_", " "): value for key, value in metrics.items() if key.startswith("perplexity_at_")}
    sizes, rest = list(MEASURED.items())[:2], list(MEASURED.items())[2:]
    row = head | {column: metrics[key] for key, column in sizes} | {"fraction removed": cell["fraction_removed"]}
    row |= {column: float(value) for column, value in windows.items()}  # JSON has no infinity: it is the text "inf"
    row |= {"error": cell["relative_error"]} if "relative_error" in cell else {}
    row |= {"seconds": cell["seconds"]} if "seconds" in cell else {}
    row |= {"peak memory, MiB": round(cell["peak_memory"] / 2**20)}
    row |= {column: metrics[key] for key, column in rest if key in metrics}
    return row | dict(note="; ".join(cell.get("notes", ())))


def short(rows: Sequence[Row]) -> list[Row]:
    """The columns for a terminal."""
    keep = ("method", "ratio", "fraction removed", "perplexity", "accuracy", "error", "seconds", "peak memory, MiB")
    return [
        {column: row.get(column) for column in _columns(rows) if column.startswith(keep)} | dict(note=row["note"].split(":")[0])
        for row in rows
    ]


def csv_text(rows: Sequence[Row]) -> str:
    """All columns and digits."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, _columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def markdown(rows: Sequence[Row], settings: Mapping[str, Any]) -> str:
    """One table a ratio, the dense model first and then the lowest perplexity, after the settings that all cells share."""
    quality = perplexity_column(rows)
    columns = [column for column in _columns(rows) if column != "ratio"]
    parts = ["# Methods compared", "\n".join(f"- {name}: {value}" for name, value in _flat(settings))]
    for ratio in dict.fromkeys(row["ratio"] for row in rows[1:]):
        body = sorted((row for row in rows[1:] if row["ratio"] == ratio), key=lambda row: row.get(quality, float("inf")))
        body.sort(key=lambda row: quality not in row)  # failures after what is infinite
        lines = [columns, ["---"] * len(columns)]
        lines += [[_cell(column, row.get(column)) for column in columns] for row in [*rows[:1], *body]]
        parts += [f"## Ratio {ratio}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n\n".join([*parts, LEGEND]) + "\n"


def _columns(rows: Sequence[Row]) -> list[str]:
    found = dict.fromkeys(column for row in sorted(rows, key=len, reverse=True) for column in row if column != "note")
    return [*found, "note"]


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        elif value is not None:
            yield name.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value.replace("|", "\\|")
    if column.startswith("perplexity"):
        return f"{value:.2f}" if value < 1e4 else f"{value:.2g}"
    return format(value, FORMATS.get(column, ",.0f"))
