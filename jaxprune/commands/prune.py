"""`jaxprune prune`: a model in, a smaller one out."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np

from jaxprune import data, folder, methods, models, pipeline, proof, surgery
from jaxprune._files import atomic_folder
from jaxprune.commands._common import ModelName, Output, check_tokens, flag, layer_range, peak_memory, say, stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Text that the scores are computed on."""

    calibration: Annotated[str, flag("SRC")] = "builtin"
    """A text file, FILE.jsonl:FIELD, hub:NAME[:CONFIG[:SPLIT[:FIELD]]], builtin (Python's documentation) or self (sampled)."""
    samples: Annotated[int | None, flag("N", "the method's own")] = None
    """Sequences."""
    length: Annotated[int | None, flag("T", "the method's own")] = None
    """Tokens in a sequence."""
    calibration_sha256: Annotated[str | None, flag("HEX", "any text will do")] = None
    """Stop unless the calibration text has this SHA-256, as recorded in jaxprune.json."""
    seed: Annotated[int, flag("N")] = 0
    """Of the calibration windows and of random numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """How units are scored."""

    taylor: Literal["param_first", "param_second", "param_mix", "vectorize"] = "param_first"
    """Variant of the Taylor score."""
    aggregate: Annotated[Literal["sum", "mean", "max", "prod"] | None, flag("{sum,mean,max,prod}", "the method's own")] = None
    """How the tensors of a unit are combined."""
    steps: Annotated[int, flag("N")] = 1
    """Score and cut this many times, towards the ratio in equal steps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Where units may go, and what shapes may come out."""

    ranking: Literal["local", "global"] = "local"
    """local: the same widths in every layer. global: the lowest scores, wherever they are."""
    units: Annotated[str | None, flag("A,B", "kv,mlp, or what the method scores")] = None
    """kv,mlp (KV groups and MLP channels, or one of them), layers (whole layers) or hidden (residual channels)."""
    layers: Annotated[str | None, flag("A:B", "all layers")] = None
    """A:B, prune only layers A to B-1."""
    protect_first: Annotated[int, flag("N")] = 0
    """Leave the first N layers alone."""
    protect_last: Annotated[int, flag("N")] = 0
    """Leave the last N layers alone."""
    multiple_of: Annotated[int, flag("N")] = 8
    """MLP widths are multiples of this."""
    max_distinct: Annotated[int | None, flag("N", "no limit")] = None
    """At most this many different layer shapes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune:
    """Prune a model: score its units, remove the least important ones, prove the cut and save the smaller model.

    Example: jaxprune prune smollm2 --out small --ratio 0.2
    """

    model: ModelName
    out: Annotated[Path, flag("DIR")]
    """Folder to write."""
    ratio: Annotated[float, flag("R")] = 0.2
    """Fraction of the parameters of all attention and MLP matrices to remove."""
    method: Annotated[str, flag("NAME")] = "taylor"
    """How units are scored; `jaxprune methods` lists them."""
    plan: Annotated[Path | None, flag("FILE", "none")] = None
    """Cut by this plan (a plan or a jaxprune.json) instead of scoring."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights. Scores are float32 in any case."""
    overwrite: bool = False
    """Replace the output folder if it has content."""
    calibration: Calibration = Calibration()
    scoring: Scoring = Scoring()
    shape: Shape = Shape()
    output: Output = Output()

    def settings(self) -> pipeline.Settings:
        """The flags as `pipeline.Settings`."""
        given = self.shape.units
        units = tuple(given.split(",")) if given is not None else methods.default_units(self.method)
        return pipeline.Settings(
            method=self.method,
            ratio=self.ratio,
            units=units,
            ranking=self.shape.ranking,
            layers=layer_range(self.shape.layers),
            protect_first=self.shape.protect_first,
            protect_last=self.shape.protect_last,
            steps=self.scoring.steps,
            multiple_of=self.shape.multiple_of,
            max_distinct=self.shape.max_distinct,
            taylor=self.scoring.taylor,
            aggregate=self.scoring.aggregate,
            seed=self.calibration.seed,
        )


def run(args: Prune) -> dict[str, Any]:
    """Prunes and saves; returns what happened, for a table."""
    settings, seconds = args.settings(), dict[str, float]()
    reads_text = args.plan is None and methods.find(args.method).needs != "weights"
    if args.calibration.calibration_sha256 is not None and not reads_text:
        raise ValueError(f"calibration_sha256: given, but {'--plan' if args.plan else args.method} reads no text; leave it out")
    with atomic_folder(args.out, overwrite=args.overwrite) as out:
        with stage("loading", seconds):
            model = folder.load(args.model, args.dtype)
        tokens = calibration = None
        if reads_text:
            with stage("reading calibration text", seconds):
                calibration = calibration_tokens(args.calibration, settings, model)
                tokens = calibration.tokens
        with stage("pruning", seconds):
            if args.plan is None:
                pruned = pipeline.prune(model.params, model.cfg, tokens, settings, say)
            else:
                plan = folder.read_plan(args.plan)
                pruned = pipeline.Pruned(*surgery.cut(model.params, model.cfg, plan), plan, (), ())
        with stage("verifying", seconds):
            report = proof.verify(
                model.params, model.cfg, pruned.params, pruned.cfg, pruned.plan, probe_tokens(tokens, model.cfg)
            )
        if not report.exact:
            raise AssertionError(f"the cut is not exact: {report}; please report this")
        for note in pruned.notes:
            say(f"note: {note}")
        result = summary(model.cfg, pruned, report, seconds)
        record = dict(
            plan=json.loads(pruned.plan.to_json()),
            method=dict(name="plan" if args.plan else args.method) | ({} if args.plan else dataclasses.asdict(settings)),
            source=args.model,
            calibration=None if calibration is None else described(calibration),
            seed=args.calibration.seed,
            versions=folder.versions(),
            metrics=result,
            updates=[],
            before=model.record,
        )
        with stage("saving", seconds):
            folder.save(out, folder.Model(pruned.params, pruned.cfg, model.tokenizer, str(args.out), record))
            scores = {f"{i}.{a}": np.asarray(x) for i, layer in enumerate(pruned.scores) for a, x in layer.items()}
            np.savez(out / "scores.npz", allow_pickle=False, **scores)
    return result | {"folder": str(args.out)}


def calibration_tokens(flags: Calibration, settings: pipeline.Settings, model: folder.Model) -> data.Calibration:
    """The calibration tokens that the flags ask for, each step's own."""
    method = methods.find(settings.method)
    found = data.token_blocks(
        flags.calibration,
        model.tokenizer,
        samples=(method.samples if flags.samples is None else flags.samples) * settings.steps,
        length=method.length if flags.length is None else flags.length,
        seed=flags.seed,
        sampler=lambda n, t, seed: data.self_blocks(model.params, model.cfg, samples=n, length=t, key=jax.random.key(seed)),
    )
    if flags.calibration_sha256 is not None:
        data.check_sha256(flags.calibration_sha256, found.sha256, flags.calibration)
    check_tokens(found.tokens, model.cfg, flags.calibration)
    return found


def described(calibration: data.Calibration) -> dict[str, Any]:
    """What the record says of calibration data."""
    samples, length = calibration.tokens.shape
    return dict(source=calibration.source, sha256=calibration.sha256, samples=samples, length=length)


def probe_tokens(tokens: Any, cfg: models.LlamaConfig) -> Any:
    """Tokens to verify on: of the calibration set, or drawn evenly from the vocabulary where there is none."""
    if tokens is not None:
        return tokens[:2, :64]
    return np.random.default_rng(0).integers(0, cfg.vocab, (2, 64), dtype=np.int32)


def summary(
    cfg: models.LlamaConfig, pruned: pipeline.Pruned, report: proof.Report, seconds: dict[str, float]
) -> dict[str, Any]:
    """The numbers that the command prints."""
    return {
        "decoder parameters before": cfg.decoder_parameters,
        "decoder parameters after": pruned.cfg.decoder_parameters,
        "fraction removed": round(1 - pruned.cfg.decoder_parameters / cfg.decoder_parameters, 4),
        "all parameters before": models.count_parameters(cfg),
        "all parameters after": models.count_parameters(pruned.cfg),
        "largest logit difference, masked and cut": report.difference,
        "peak memory, MiB": round(peak_memory() / 2**20),
        "notes": list(pruned.notes),
        "seconds": seconds,
    }
