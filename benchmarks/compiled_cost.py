"""What the compiled programs cost: work of each device as devices are added, and how programs grow with the model.

    python benchmarks/compiled_cost.py [--only scaling|growth] [--figure FILE.png] [--json FILE]

Nothing is run, so numbers do not depend on the machine, but for the seconds of compiling.

`scaling`: one step of a stage on 1, 2, 4 and 8 simulated devices (they share cores, so time would say nothing), one sequence of
1024 tokens for each device, a mesh of one axis. TFLOPs, bytes and collectives of each device, from `jaxprune.sizing`. With
ideal weak scaling the TFLOPs of a device stay and nothing travels.

`growth`: programs of models with 8 layers of width 256, vocabulary 8192, one of these varied at a time, and the number of
different shapes among 16 layers; 2 sequences of 256 tokens, float32, one device. `instructions` are those of the optimised
program, each loop's body once.

Tables, figure and what they say: docs/compiled_cost.md.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

import _common
import tyro

GIB = 2**30
DEVICES = (1, 2, 4, 8)
GROWTH = dict(
    layers=(4, 8, 16, 32, 64), width=(128, 256, 512, 1024), vocabulary=(2048, 8192, 32768, 131072), shapes=(1, 2, 4, 8)
)
LAYERS_OF_SHAPES = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Counts what compiled programs cost."""

    only: Literal["scaling", "growth"] | None = None
    """One of the two parts."""
    model_config: str = "llama-8b"
    """Model of the first part, as `jaxprune size` names them."""
    stages: tuple[str, ...] = ("score", "reconstruct", "recover")
    """Of the first part."""
    length: int = 1024
    """Tokens in each sequence of the first part."""
    figure: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None
    """Draw the second part."""
    json: Path | None = None
    """Write the result to this file, too."""


def scaling(args: Args) -> list[dict[str, Any]]:
    """A row for each stage, axis and number of devices; one device is the same on every axis."""
    from jaxprune import sharding, sizing
    from jaxprune.commands import size

    cfg, rows = size.config(args.model_config), []
    for stage in args.stages:
        meshes = ["data=1"] + [f"{axis}={n}" for axis in sharding.AXES for n in DEVICES[1:]]
        for text in meshes:
            mesh = sharding.mesh_of(text)
            found = sizing.size(cfg, mesh, stage, batch=mesh.size, length=args.length)
            row = {
                "stage": stage,
                "mesh": text,
                "TFLOPs": found.work.flops / 1e12,
                "weights, GiB": found.weights / GIB,
                "temporaries, GiB": found.temporaries / GIB,
                "in all, GiB": found.total / GIB,
                "collectives, GiB": sum(found.work.collectives.values()) / GIB,
            }
            rows.append(row)
            print(*(f"{x:.3f}" if isinstance(x, float) else x for x in row.values()), flush=True)
    return rows


def growth() -> list[dict[str, Any]]:
    """A row for each stage and size of a model."""
    import _programs

    _programs.compiled("forward", _programs.model(layers=1))  # what is imported and set up once
    rows = []
    for what, stage in itertools.product(GROWTH, _programs.STAGES):
        for n in GROWTH[what]:
            more = dict(layers=LAYERS_OF_SHAPES) if what == "shapes" else {}
            found = _programs.compiled(stage, _programs.model(**{what: n}, **more))
            rows.append(dict(varied=what, stage=stage, n=n) | found._asdict())
    return rows


def wide(rows: list[dict[str, Any]], what: str, column: str) -> list[dict[str, Any]]:
    """A row for each stage, a column for each size."""
    stages = dict.fromkeys(row["stage"] for row in rows)
    found = {(row["stage"], row["n"]): row[column] for row in rows if row["varied"] == what}
    return [{f"{column} by {what}": s} | {str(n): found[s, n] for n in GROWTH[what]} for s in stages]


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """One column for each size that varies; seconds, instructions and temporaries below each other."""
    from jaxprune import _plot
    from jaxprune._files import atomic_bytes

    colours = (_plot.BLUE, _plot.ORANGE, "#E69F00", _plot.GREEN, "#CC79A7", _plot.DARK)
    measures = dict(seconds="compiling, processor s", instructions="instructions", temporaries="temporaries, MiB")
    drawn, axes = _plot.grid(len(measures) * len(GROWTH), len(GROWTH), width=12, height=2.6)
    for ax, (column, what) in zip(axes, itertools.product(measures, GROWTH), strict=True):
        for colour, stage in zip(colours, dict.fromkeys(row["stage"] for row in rows), strict=True):
            points = [(row["n"], row[column]) for row in rows if (row["varied"], row["stage"]) == (what, stage)]
            ax.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3.5, linewidth=1.3, label=stage)
        ax.set_xscale("log", base=2)
        ax.set_xticks(GROWTH[what], [f"{n // 1024}k" if n >= 2048 else str(n) for n in GROWTH[what]])
        ax.set_yscale("log", base=2)
        ax.set_ylim(0.8 * min(row[column] for row in rows), 1.25 * max(row[column] for row in rows))
        ax.yaxis.set_major_formatter("{x:g}")
        name = f"different shapes of {LAYERS_OF_SHAPES} layers" if what == "shapes" else what
        _plot.label(ax, "", name if column == "temporaries" else "", measures[column] if what == "layers" else "")
    handles, names = axes[0].get_legend_handles_labels()
    drawn.legend(handles, names, loc="outside upper center", ncols=len(names), fontsize=9, frameon=False)
    atomic_bytes(path, _plot.png(drawn))


def main(args: Args) -> None:
    """Compiles, prints the tables and draws."""
    from jaxprune._json import write_json
    from jaxprune.commands import size

    size.simulate(max(DEVICES))
    found: dict[str, Any] = {}
    if args.only != "growth":
        found["scaling"] = scaling(args)
        _common.show(f"{args.model_config}, {args.length} tokens a device", found["scaling"], None)
    if args.only != "scaling":
        found["growth"] = growth()
        for what, column in itertools.product(GROWTH, ("instructions", "products", "temporaries", "seconds")):
            _common.show("", wide(found["growth"], what, column), None)
        if args.figure is not None:
            figure(found["growth"], args.figure)
    if args.json is not None:
        write_json(args.json, found)


if __name__ == "__main__":
    main(tyro.cli(Args))
