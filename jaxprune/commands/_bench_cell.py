"""One cell of `jaxprune bench`, measured in a process of its own, so that its peak memory is nobody else's."""

import json
import os
import subprocess
import sys
import time
from typing import Any, Literal, NamedTuple

import jax

from jaxprune import folder, methods, pipeline, sparsify
from jaxprune._json import plain
from jaxprune._progress import progress
from jaxprune.commands import _devices, evaluate
from jaxprune.commands._calibration import Calibration, Reconstruction, calibration_tokens, described
from jaxprune.commands._common import peak_memory, say, stage
from jaxprune.commands._sparse_result import zeros
from jaxprune.commands.sparsify import calibrated
from jaxprune.recovery import sparse
from jaxprune.scorers.taylor import KINDS

SPARSE = "sparse:"  # in front of the methods of `jaxprune sparsify`
# Ctrl-C ends the child at once and without a word: the process that started it says what there is to say.
START = "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); from jaxprune.commands._bench_cell import main; main()"


class Cell(NamedTuple):
    """What is measured; JSON can hold it.

    Attributes:
      model, dtype: see `folder.load`.
      method: a name, `taylor:VARIANT`, `sparse:METHOD`, `sparse:METHOD:N:M`, or None for the dense model.
      ratio: fraction to remove, or of zeros.
      calibration: fields of `_calibration.Calibration`.
      evaluation: fields of `evaluate.Evaluate` besides the model, its type and its devices.
      devices: fields of `_devices.Devices`.
    """

    model: str
    dtype: Literal["float32", "bfloat16"]
    method: str | None
    ratio: float
    calibration: dict[str, Any]
    evaluation: dict[str, Any]
    devices: dict[str, Any]


def _sparse(method: str, ratio: float) -> tuple[str, sparse.Pattern]:
    """The method of `jaxprune sparsify` and the pattern that a method of the bench stands for."""
    name, colon, pattern = method.removeprefix(SPARSE).partition(":")
    return name, sparse.n_of_m(pattern) if colon else sparse.Pattern(ratio)


def ratio_of(method: str, asked: float) -> float:
    """The ratio that a method is measured at: N:M is one by itself."""
    return _sparse(method, asked)[1].fraction if method.startswith(SPARSE) else asked


def settings(method: str, ratio: float, seed: int, devices: _devices.Devices) -> pipeline.Settings | sparsify.Sparsity:
    """The settings of a method as `prune --method` or `sparsify --method` has them.

    Raises:
      ValueError: there is no such method or variant, or the ratio is out of range.
    """
    if method.startswith(SPARSE):
        name, pattern = _sparse(method, ratio)
        return sparsify.Sparsity(method=name, pattern=pattern)
    name, _, variant = method.partition(":")
    if ":" in method and (name != "taylor" or variant not in KINDS):
        raise ValueError(
            f"methods: {method!r} given; only taylor has variants: {', '.join(f'taylor:{kind}' for kind in KINDS)}"
        )
    own: dict[str, Any] = dict(taylor=variant) if variant else {}
    units = methods.default_units(name)
    return pipeline.Settings(method=name, ratio=ratio, units=units, seed=seed, **devices.multiples(units), **own)


def apart(cell: Cell) -> dict[str, Any]:
    """Measures a cell in a new process; what that says on stderr passes through.

    Returns:
      What `measured` returns, as JSON has it; or `failed`, the line that tells the user why.

    Raises:
      ChildProcessError: the process ended in another way.
    """
    argument = json.dumps(plain(cell))
    done = subprocess.run([sys.executable, "-c", START, argument], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        killed = ", perhaps for want of memory" if done.returncode == -9 else ""
        raise ChildProcessError(f"its process ended with status {done.returncode}{killed}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """The new process: a cell as the argument, the result on stdout."""
    cell = Cell(**json.loads(sys.argv[1]))
    try:
        with _devices.set_mesh(_devices.Devices(**cell.devices)):
            result = measured(cell)
    except (ValueError, OSError) as error:
        if os.environ.get("JAXPRUNE_TRACEBACK"):
            raise
        result = dict(failed=" ".join(str(error).split()) or type(error).__name__)
    print(json.dumps(plain(result)))


def measured(cell: Cell) -> dict[str, Any]:
    """Loads, prunes and evaluates.

    Args:
      cell: what to measure.

    Returns:
      - `metrics`: what `evaluate` measures;
      - `fraction_removed`: of the parameters of the attention and MLP matrices, or how many of them are zero;
      - `peak_memory`: bytes, the largest resident size of this process until the cut is made: Python, JAX, loading the weights,
        reading calibration text, scoring and cutting with their compilation. Evaluation comes later and is not included, nor is
        the memory of an accelerator. That of the dense model is what loading takes;
      - `versions`, the device among them;
      - unless the model is dense: `seconds` on the clock for scoring and cutting with their compilation, without loading,
        reading calibration text and evaluation; `settings`, `calibration` and `notes`;
      - of a sparse model: `relative_error` of the outputs of its matrices, summed.

    Raises:
      ValueError, OSError: the cell cannot be measured, and a user can tell why.
    """
    devices = _devices.Devices(**cell.devices)
    flags = evaluate.Evaluate(model=cell.model, dtype=cell.dtype, devices=devices, **cell.evaluation)
    text, choices = evaluate.inputs(flags)
    with stage("loading", {}):
        model = _devices.load(devices, cell.model, cell.dtype)
    before, own = model.cfg.decoder_parameters, dict[str, Any]()
    if cell.method is not None:
        how = settings(cell.method, cell.ratio, cell.calibration["seed"], devices)
        model, own = _pruned(cell, how, model) if isinstance(how, pipeline.Settings) else _sparsified(cell, how, model)
    own["peak_memory"] = peak_memory()
    own.setdefault("fraction_removed", 1 - model.cfg.decoder_parameters / before)
    return own | dict(metrics=evaluate.measured(model, flags, text, choices), versions=folder.versions())


def _pruned(cell: Cell, how: pipeline.Settings, model: folder.Model) -> tuple[folder.Model, dict[str, Any]]:
    flags = Calibration(**cell.calibration)
    tokens = fit = read = None
    if methods.find(how.method).needs != "weights":
        calibration, fit = calibration_tokens(flags, Reconstruction(), how, model, how.target)
        tokens, read = calibration.tokens, described(calibration, fit)
    begin = time.perf_counter()
    small = pipeline.prune(model.params, model.cfg, tokens, how, say, fit_tokens=fit, progress=progress)
    jax.block_until_ready(small.params)
    seconds = time.perf_counter() - begin
    return model._replace(params=small.params, cfg=small.cfg), dict(
        seconds=seconds, settings=how, calibration=read, notes=small.notes
    )


def _sparsified(cell: Cell, how: sparsify.Sparsity, model: folder.Model) -> tuple[folder.Model, dict[str, Any]]:
    sparsify.chosen(model.cfg, how)
    flags = Calibration(**cell.calibration)
    if flags.candidates > 1:
        raise ValueError(f"candidates: {flags.candidates} given; that is for methods that prune units; leave it out")
    calibration = calibrated(flags, model)
    batches = pipeline.batches(calibration.tokens, model.params)
    begin = time.perf_counter()
    params, found = sparsify.sparsify(model.params, model.cfg, batches, how, progress=progress)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - begin
    return model._replace(params=params), dict(
        seconds=seconds,
        settings=how,
        calibration=described(calibration),
        notes=tuple(dict.fromkeys(note for m in found.values() for note in m.notes)),
        fraction_removed=zeros(model.cfg, found)[0] / model.cfg.decoder_parameters,
        relative_error=sum(m.error for m in found.values()),
    )
