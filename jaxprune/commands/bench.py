"""`jaxprune bench`: every method on the same model, data and size."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from jaxprune import _bench_figures, _bench_table, _plot, data, methods, sparsify
from jaxprune._files import atomic_bytes, atomic_text
from jaxprune._json import write_json
from jaxprune.commands import _bench_cell, _devices, evaluate
from jaxprune.commands._bench_cell import Cell
from jaxprune.commands._calibration import Calibration
from jaxprune.commands._common import ModelName, Output, check_least, flag, say
from jaxprune.commands._stages import kept, once, opened
from jaxprune.models import checkpoint
from jaxprune.models.mamba_config import only_llama


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """What is measured of every model."""

    text: Annotated[str, flag("SRC")] = "builtin-heldout"
    """Text for perplexity; keep it apart from calibration text."""
    window: Annotated[tuple[int, ...], flag("T [T ...]")] = (1024, 128)
    """Tokens in a window; the first one is that of the figures."""
    max_tokens: Annotated[int | None, flag("N", "all")] = 8192
    """Read at most this many tokens of the text."""
    choice: Annotated[Path | None, flag("FILE", "none")] = None
    """Multiple-choice questions: .jsonl with query, choices and gold."""
    limit: Annotated[int | None, flag("N", "all")] = None
    """Read at most this many questions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Compare methods: prune a model by each, or make it sparse, at each ratio, and measure these and the dense model alike.

    Perplexity, accuracy, parameters, seconds of scoring and cutting (compilation included; loading and evaluation not), peak
    memory of the process until the cut is made (evaluation not included), and speed. Each cell, a method at a ratio, runs in a
    process of its own and is kept in DIR/cells. Started again, also with further methods or ratios, the command measures what
    is missing; a cell that failed is not missing: remove its file to try it again.

    Example: jaxprune bench smollm2 --out bench --methods taylor,fisher,random --ratios 0.2 0.5
    """

    model: ModelName
    out: Annotated[Path, flag("DIR")]
    """Folder for bench.json, bench.csv, bench.md, quality_size.png, seconds_quality.png and cells/."""
    methods: Annotated[str, flag("A,B")] = "all"
    """Names that `jaxprune methods` lists, or all for each of them; taylor:VARIANT is a variant of the Taylor score, as in
    taylor:param_second; sparse:METHOD is a method of `jaxprune sparsify`, sparse:METHOD:N:M the same with N:M at its own ratio,
    as in sparse:apt:2:4."""
    ratios: Annotated[tuple[float, ...], flag("R [R ...]")] = (0.2,)
    """Fractions of the parameters of all attention and MLP matrices to remove, or to set to zero."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""
    overwrite: bool = False
    """Begin anew in a folder that holds cells of other settings."""
    calibration: Calibration = Calibration()
    measurement: Measurement = Measurement()
    spread: _devices.Devices = _devices.Devices()
    output: Output = Output()

    def kept(self) -> str | None:
        """How to go on after an interruption, or None where nothing was kept."""
        return kept(self.out)

    def cells(self) -> dict[str, Cell]:
        """Name -> what is measured; the dense model comes first."""
        names = [name for given in self.methods.split(",") for name in (methods.METHODS if given == "all" else [given])]
        pairs = [(name, _bench_cell.ratio_of(name, ratio)) for ratio in self.ratios for name in names]
        asked = {"dense": (None, 0.0)} | {f"{name.replace(':', '-')}-{ratio}": (name, ratio) for name, ratio in pairs}
        fixed = dict(
            calibration=dataclasses.asdict(self.calibration),
            evaluation=dataclasses.asdict(self.measurement),
            devices=dataclasses.asdict(self.spread),
        )
        return {key: Cell(self.model, self.dtype, name, ratio, **fixed) for key, (name, ratio) in asked.items()}


def run(args: Bench) -> dict[str, Any]:
    """Measures the cells that are missing, then writes the tables and the figures."""
    asked = args.cells()
    _check(args, asked)
    settings = {
        k: v for k, v in dataclasses.asdict(args).items() if k not in ("out", "methods", "ratios", "overwrite", "output")
    }
    with opened(args.out, settings, overwrite=args.overwrite):
        cells, crashed = _measured(args.out, asked)
        result = _written(args.out, settings, cells)
    if crashed:
        raise ChildProcessError(f"{'; '.join(crashed)}; the other cells are in {args.out}; run again to try these again")
    return result


def _check(args: Bench, asked: dict[str, Cell]) -> None:
    """Refuses flags and files that a cell would stumble over, before anything is done.

    No array is made here, for then this process would hold an accelerator that its children need.
    """
    if not args.ratios:
        raise ValueError("ratios: none given; give at least one between 0 and 1, e.g. 0.2")
    check_least(args.calibration, samples=1, length=2)
    only_llama(checkpoint.read_config(args.model), "bench")
    evaluate.inputs(evaluate.Evaluate(model=args.model, **dataclasses.asdict(args.measurement)))
    used = [
        _bench_cell.settings(c.method, c.ratio, args.calibration.seed, args.spread)
        for c in asked.values()
        if c.method is not None
    ]
    reads = (isinstance(s, sparsify.Sparsity) or methods.find(s.method).needs != "weights" for s in used)
    if args.calibration.calibration != "self" and any(reads):
        data.read_text(args.calibration.calibration)


def _measured(folder: Path, asked: dict[str, Cell]) -> tuple[dict[str, Any], list[str]]:
    """The cells that there are in the end, and a line for each whose process broke down."""
    cells, crashed = dict[str, Any](), list[str]()
    for i, (name, cell) in enumerate(asked.items()):
        what = f"{name} (cell {i + 1} of {len(asked)})"
        try:
            cells[name] = once(folder / "cells" / f"{name}.json", what, partial(_cell, folder / "cells", cell))
        except ChildProcessError as error:
            line = f"{name}: {error}"
            if cell.method is None:
                raise ChildProcessError(line) from None
            crashed.append(line)
            say(line)
    return cells, crashed


def _cell(folder: Path, cell: Cell) -> dict[str, Any]:
    result = _bench_cell.apart(cell)
    if "failed" in result:
        if cell.method is None:  # what the dense model cannot do, no other can
            raise ValueError(result["failed"])
        say(f"failed: {result['failed']}")
    folder.mkdir(exist_ok=True)
    return dict(method=cell.method or "dense", ratio=cell.ratio) | result


def _written(folder: Path, settings: dict[str, Any], cells: dict[str, Any]) -> dict[str, Any]:
    rows = _bench_table.rows(cells.values())
    result = dict(settings=settings, cells=cells)
    write_json(folder / "bench.json", result)
    atomic_text(folder / "bench.csv", _bench_table.csv_text(rows))
    atomic_text(folder / "bench.md", _bench_table.markdown(rows, settings))
    for name, draw in _bench_figures.FIGURES.items():
        atomic_bytes(folder / f"{name}.png", _plot.png(draw(rows)))
    failed = [dict(failed=name, why=cell["failed"]) for name, cell in cells.items() if "failed" in cell]
    return result | dict(table=_bench_table.short(rows), failed=failed, folder=str(folder))
