"""`jaxprune run`: all of it, stage by stage; a stage that is complete is not run again."""

import dataclasses
import functools
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from jaxprune import _hosts, data, folder, methods, report
from jaxprune._decode import check_file
from jaxprune._scores_file import read_scores
from jaxprune.commands import _budget, _devices, evaluate, prune, recover, verify
from jaxprune.commands._calibration import Calibration, Reconstruction
from jaxprune.commands._common import ModelName, Output, flag
from jaxprune.commands._compute import Compute
from jaxprune.commands._distillation import Distillation
from jaxprune.commands._stages import flags_of, kept, once, opened
from jaxprune.commands.generate import check_prompt, continuation
from jaxprune.models import checkpoint
from jaxprune.models.mamba_config import only_llama
from jaxprune.plan import Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recovery:
    """Training with adapters (LoRA) after the cut."""

    data: Annotated[str, flag("SRC")] = "builtin"
    """Instructions (.json, .jsonl) or any text source; `none` leaves recovery out."""
    recovery_steps: Annotated[int, flag("N")] = 40
    """Updates."""
    batch_size: Annotated[int, flag("N")] = 4
    """Sequences in an update."""
    recovery_length: Annotated[int, flag("T")] = 128
    """Tokens in a sequence."""
    learning_rate: Annotated[float, flag("R")] = 5e-4
    """Highest learning rate."""
    distill: bool = False
    """Learn from the dense model's distribution of the next token instead of the text's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured before and after."""

    text: Annotated[str, flag("SRC")] = "builtin-heldout"
    """Text for perplexity; keep it apart from calibration and training data."""
    window: Annotated[int, flag("T")] = 1024
    """Tokens in a window."""
    max_tokens: Annotated[int | None, flag("N")] = 8192
    """Read at most this many tokens of the text."""
    choice: Annotated[Path | None, flag("FILE", "none")] = None
    """Multiple-choice questions (.jsonl with query, choices, gold)."""
    limit: Annotated[int | None, flag("N")] = 200
    """Read at most this many questions."""
    prompt: Annotated[str, flag("TEXT")] = "The capital of France is"
    """Text that the models continue in the report."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Prune, verify, recover, evaluate, generate and report, in one go. Started again, it goes on where it stopped.

    Example: jaxprune run smollm2 --out demo
    """

    model: ModelName
    out: Annotated[Path, flag("DIR")]
    """Folder for the models (pruned/, recovered/), the numbers (*.json), the figures and report.html."""
    ratio: Annotated[float | None, flag("R", "0.2, unless a target is given")] = None
    """Fraction of the parameters of all attention and MLP matrices to remove."""
    method: Annotated[str, flag("NAME")] = methods.DEFAULT
    """How units are scored; `jaxprune methods` lists them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""
    overwrite: bool = False
    """Begin anew in a folder that holds another run."""
    budget: _budget.Budget = _budget.Budget()
    calibration: Calibration = Calibration()
    scoring: prune.Scoring = prune.Scoring()
    reconstruction: Reconstruction = Reconstruction()
    shape: prune.Shape = prune.Shape()
    recovery: Recovery = Recovery()
    evaluation: Evaluation = Evaluation()
    devices: _devices.Devices = _devices.Devices()
    hosts: _devices.Hosts = _devices.Hosts()
    compute: Compute = Compute()
    output: Output = Output()

    def kept(self) -> str | None:
        """How to go on after an interruption, or None where nothing was kept."""
        return kept(self.out)

    def prune_flags(self) -> prune.Prune:
        """The flags of the pruning stage."""
        return prune.Prune(
            model=self.model, out=self.out / "pruned", ratio=self.ratio, method=self.method, dtype=self.dtype, overwrite=True,
            budget=self.budget, calibration=self.calibration, scoring=self.scoring, reconstruction=self.reconstruction,
            shape=self.shape, devices=self.devices,
        )  # fmt: skip

    def recover_flags(self) -> recover.Recover:
        """The flags of the recovery stage."""
        r = self.recovery
        return recover.Recover(
            model=str(self.out / "pruned"), data=r.data, out=self.out / "recovered", steps=r.recovery_steps, overwrite=True,
            resume=True, batch_size=r.batch_size, length=r.recovery_length, learning_rate=r.learning_rate,
            seed=self.calibration.seed, distillation=Distillation(distill=self.model if r.distill else None),
            devices=self.devices,
        )  # fmt: skip

    def evaluate_flags(self, model: str) -> evaluate.Evaluate:
        """The flags of an evaluation."""
        e = self.evaluation
        windows = tuple(dict.fromkeys((e.window, min(128, e.window))))
        return evaluate.Evaluate(
            model=model, text=e.text, window=windows, max_tokens=e.max_tokens, choice=e.choice, limit=e.limit, dtype=self.dtype,
            devices=self.devices,
        )  # fmt: skip


def run(args: Run) -> dict[str, Any]:
    """Runs the stages that are not complete, then writes the report."""
    with _hosts.alike():
        _check(args)
    with opened(args.out, flags_of(args), overwrite=args.overwrite):
        return _stages(args)


def _check(args: Run) -> None:
    """Refuses flags and files that a later stage would stumble over, before anything is done."""
    args.prune_flags().settings()
    only_llama(checkpoint.read_config(args.model), "run")
    recover.optimizer(args.recover_flags())
    check_prompt(args.evaluation.prompt)
    evaluate.inputs(args.evaluate_flags(args.model))
    if args.recovery.data.endswith((".json", ".jsonl")):
        check_file(args.recovery.data)
    elif args.recovery.data != "none":
        data.read_text(args.recovery.data)


def _stages(args: Run) -> dict[str, Any]:
    done: dict[str, Any] = {"prune": once(args.out / "prune.json", "pruning", lambda: prune.run(args.prune_flags()))}
    stages = {"dense": args.model, "pruned": str(args.out / "pruned")}
    if args.recovery.data != "none":
        done["recover"] = once(args.out / "recover.json", "recovery", lambda: recover.run(args.recover_flags()))
        stages["recovered"] = str(args.out / "recovered")
    last = stages[next(reversed(stages))]
    done["verify"] = once(
        args.out / "verify.json",
        "verification",
        lambda: verify.run(verify.Verify(dense=args.model, pruned=last, devices=args.devices)),
    )
    metrics, samples = {}, {}
    for name, model in stages.items():
        measure = functools.partial(evaluate.run, args.evaluate_flags(model))
        metrics[name] = once(args.out / f"evaluate-{name}.json", f"evaluation, {name}", measure)
        write = functools.partial(_sample, args, model)
        samples[name] = once(args.out / f"sample-{name}.json", f"sample, {name}", write)["text"]
    page = args.out / "report.html"
    _hosts.by_first(_report, args, done, metrics, samples)
    return _rows(metrics) | {"exact": done["verify"]["exact"], "report": str(page)}


def _recovery(args: Run, done: dict[str, Any]) -> dict[str, Any] | None:
    if "recover" not in done:
        return None
    loss = "divergence from the dense model" if args.recovery.distill else "cross-entropy"
    return {k: done["recover"][k] for k in ("training data", "steps")} | {"loss": loss}


def _sample(args: Run, model: str) -> dict[str, Any]:
    return {"text": continuation(_devices.load(args.devices, model, args.dtype), args.evaluation.prompt, 48)}


def _rows(metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
    keys = dict.fromkeys(key for m in metrics.values() for key, value in m.items() if isinstance(value, (int, float)))
    return {"metrics": [{"": key} | {stage: m.get(key) for stage, m in metrics.items()} for key in keys]}


def _report(args: Run, done: dict[str, Any], metrics: dict[str, Any], samples: dict[str, str]) -> Path:
    record = folder.read_record(args.out / "pruned")
    assert record is not None
    dense, small = (only_llama(checkpoint.read_config(source), "run") for source in (args.model, args.out / "pruned"))
    scores = read_scores(args.out / "pruned" / "scores.npz", len(dense.layers))
    figures = {
        "widths": report.widths_figure(dense, small),
        "scores": report.scores_figure(scores, Plan.from_dict(record["plan"]).keep),
        "before_after": report.before_after_figure(metrics),
    }
    if "recover" in done:
        figures["loss"] = report.loss_figure(np.array([row["loss"] for row in done["recover"]["losses"]]))
    results = dict(
        title=f"{args.model}, {record['metrics']['fraction removed']:.1%} of the decoder removed",
        command=shlex.join(["jaxprune", *sys.argv[1:]]),
        method=record["method"],
        calibration=record["calibration"] or "none",
        recovery=_recovery(args, done),
        seed=record["seed"],
        versions=record["versions"],
        notes=record["metrics"]["notes"],
        stages=metrics,
        verify={k: v for k, v in done["verify"].items() if k != "seconds"},
        layers=report.layer_rows(dense, small),
        prompt=args.evaluation.prompt,
        samples=samples,
    )
    return report.write_report(args.out, results, figures)
