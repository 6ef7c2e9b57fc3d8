"""What `jaxprune sparsify` reports: a row for each kind of matrix, a summary, and what goes into `jaxprune.json`."""

import dataclasses
import json
from typing import Any

import numpy as np

from jaxprune import data, folder, sparsify
from jaxprune.commands._calibration import described
from jaxprune.commands._common import peak_memory
from jaxprune.models import Config, unit_counts
from jaxprune.models.axes import MAMBA_MATRICES, MATRICES
from jaxprune.plan import Plan


def by_matrix(found: dict[str, tuple[float, int]], errors: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """Zeros and violations over all layers, a row for each kind of matrix."""
    rows: list[dict[str, Any]] = []
    for matrix in (*MATRICES, *MAMBA_MATRICES):
        if names := [name for name in found if name.split(".")[-1] == matrix]:
            zeros = [found[name][0] for name in names]
            row = {"matrix": matrix, "layers": len(names), "least zeros": min(zeros), "most zeros": max(zeros)}
            row["N:M violations"] = sum(found[name][1] for name in names)
            if errors:
                row |= {
                    "mean error": float(np.mean([errors[n] for n in names])),
                    "largest error": max(errors[n] for n in names),
                }
            rows.append(row)
    return rows


def zeros(cfg: Config, found: dict[str, sparsify.Matrix]) -> tuple[float, int]:
    """Zeros and weights of all matrices together."""
    weights = [sparsify.size(cfg, int(layer), n) for _, layer, n in (name.split(".") for name in found)]
    return sum(n * m.zeros for n, m in zip(weights, found.values(), strict=True)), sum(weights)


def summary(model: folder.Model, found: dict[str, sparsify.Matrix], seconds: dict[str, float]) -> dict[str, Any]:
    """What became of all matrices together."""
    gone, weights = zeros(model.cfg, found)
    return {
        "matrices made sparse": len(found),
        "zeros, of all of them": gone / weights,
        "zeros, least of a matrix": min(m.zeros for m in found.values()),
        "N:M violations": sum(m.violations for m in found.values()),
        "relative error of the outputs, summed": sum(m.error for m in found.values()),
        "peak memory, MiB": round(peak_memory() / 2**20),
        "seconds": seconds,
    }


def record(
    args: Any,
    asked: sparsify.Sparsity,
    model: folder.Model,
    calibration: data.Calibration,
    found: dict[str, sparsify.Matrix],
    result: dict[str, Any],
    names: tuple[tuple[str, ...], ...],
) -> dict[str, Any]:
    """Of a folder that the command made sparse; `args` are its flags."""
    arrays = [n for n in model.cfg.matrices if any(n in layer for layer in names)]
    settings = dataclasses.asdict(asked) | dict(pattern=asked.pattern._asdict())
    return dict(
        plan=json.loads(Plan(tuple({} for _ in model.cfg.layers), unit_counts(model.cfg)).to_json()),
        method=dict(name=asked.method) | settings,
        source=args.model,
        calibration=described(calibration),
        seed=args.seed,
        versions=folder.versions(),
        metrics=result,
        updates=[dict(by=asked.method, arrays=arrays, settings=settings)],
        before=model.record,
        sparsity=dict(
            layerwise=args.layerwise,
            pattern=asked.pattern._asdict(),
            layers=asked.layers,
            zeros={name: m.zeros for name, m in found.items()},
        ),
    )
