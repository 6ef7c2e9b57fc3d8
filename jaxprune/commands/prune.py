"""`jaxprune prune`: a model in, a smaller one out."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from jaxprune import _hosts, _profiles, data, folder, methods, models, pipeline, proof
from jaxprune._progress import progress
from jaxprune._scores_file import write_scores
from jaxprune.commands import _budget, _devices
from jaxprune.commands._calibration import Calibration, Reconstruction, calibration_tokens, check_fit, described
from jaxprune.commands._common import ModelName, Output, Profile, flag, layer_range, peak_memory, say, stage
from jaxprune.commands._compute import Compute
from jaxprune.models import Config
from jaxprune.models.mamba_config import only_llama


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """How units are scored."""

    taylor: Literal["param_first", "param_second", "param_mix", "vectorize"] = "param_first"
    """Variant of the Taylor score."""
    aggregate: Annotated[Literal["sum", "mean", "max", "prod"] | None, flag("{sum,mean,max,prod}", "the method's own")] = None
    """How the tensors of a unit are combined."""
    steps: Annotated[int, flag("N")] = 1
    """Score and cut this many times, towards the ratio in equal steps."""
    layers_at_once: Annotated[int | None, flag("N", "all")] = None
    """Of kfac-obs: keep the statistics of so many layers, then read the text again for others; the scores are the same."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Where units may go, and what shapes may come out."""

    ranking: Annotated[str | None, flag("NAME", "the method's own")] = None
    """How the budget is spread over layers. local: the same widths in every layer. global: the lowest scores anywhere.
    standardized: globally, after each layer's scores are standardised. gamma: KV groups and channels apart. linear, log: more
    from later layers. lagrangian: least loss in sum, for scores that are curves of loss (kfac-obs).
    sensitivity: the same with measured curves."""
    units: Annotated[str | None, flag("A,B", "kv,mlp, or what the method scores; inner of Mamba")] = None
    """kv,mlp (KV groups and MLP channels, or one of them), layers (whole layers), sublayers (whole attentions and MLPs) or
    hidden (residual channels); of Mamba inner (inner channels)."""
    layers: Annotated[str | None, flag("A:B", "all layers")] = None
    """A:B, prune only layers A to B-1."""
    protect_first: Annotated[int, flag("N")] = 0
    """Leave the first N layers alone."""
    protect_last: Annotated[int, flag("N")] = 0
    """Leave the last N layers alone."""
    multiple_of: Annotated[int, flag("N")] = 8
    """MLP widths, or inner widths of Mamba, are multiples of this, and of the mesh's tensor axis; of --units hidden, the width
    of the residual stream is, and of the fsdp axis."""
    kv_multiple_of: Annotated[int | None, flag("N", "the mesh's tensor axis, or 1")] = None
    """Numbers of KV groups that change are multiples of this; with more than a layer has, it loses none."""
    min_kept: Annotated[float | None, flag("F", "the method's own")] = None
    """Every MLP keeps at least this fraction of its channels."""
    max_distinct: Annotated[int | None, flag("N", "no limit")] = None
    """At most this many different layer shapes."""
    profile: Profile = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune:
    """Prune a model: score its units, remove the least important ones, prove the cut and save the smaller model.

    Example: jaxprune prune smollm2 --out small --ratio 0.2
    """

    model: ModelName
    out: Annotated[Path, flag("DIR")]
    """Folder to write."""
    ratio: Annotated[float | None, flag("R", "0.2, unless a target is given")] = None
    """Fraction of the parameters of all attention and MLP matrices to remove."""
    method: Annotated[str, flag("NAME")] = methods.DEFAULT
    """How units are scored; `jaxprune methods` lists them."""
    plan: Annotated[Path | None, flag("FILE", "none")] = None
    """Cut by this plan (a plan or a jaxprune.json) instead of scoring."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights. Scores are float32 in any case."""
    overwrite: bool = False
    """Replace the output folder if it has content."""
    budget: _budget.Budget = _budget.Budget()
    calibration: Calibration = Calibration()
    scoring: Scoring = Scoring()
    reconstruction: Reconstruction = Reconstruction()
    shape: Shape = Shape()
    devices: _devices.Devices = _devices.Devices()
    hosts: _devices.Hosts = _devices.Hosts()
    compute: Compute = Compute()
    output: Output = Output()

    def settings(self, cfg: Config | None = None) -> pipeline.Settings:
        """The flags as `pipeline.Settings`, for a LLaMA-family model or for the model `cfg`.

        Raises:
          ValueError: they cannot be used.
        """
        given = self.shape.units
        units = tuple(given.split(",")) if given is not None else methods.default_units(self.method, cfg)
        settings = pipeline.Settings(
            method=self.method,
            ratio=pipeline.Settings.ratio if self.ratio is None else self.ratio,
            units=units,
            ranking=self.shape.ranking,
            reconstruct=self.reconstruction.reconstruct,
            min_kept=self.shape.min_kept,
            layers=layer_range(self.shape.layers),
            protect_first=self.shape.protect_first,
            protect_last=self.shape.protect_last,
            layers_at_once=self.scoring.layers_at_once,
            steps=self.scoring.steps,
            **self.devices.multiples(units, self.shape.multiple_of, self.shape.kv_multiple_of),
            max_distinct=self.shape.max_distinct,
            profile=self.shape.profile,
            taylor=self.scoring.taylor,
            aggregate=self.scoring.aggregate,
            seed=self.calibration.seed,
        )
        _budget.check(self.budget, settings, ratio=self.ratio, plan=self.plan)
        check_fit(self.reconstruction, self.target(settings))
        return settings

    def target(self, settings: pipeline.Settings) -> str | None:
        """What the weights that stay are fitted to, or None where they stay as they are."""
        return None if self.plan and self.reconstruction.reconstruct is None else settings.target


def run(args: Prune) -> dict[str, Any]:
    """Prunes and saves; returns what happened, for a table."""
    settings, seconds = args.settings(), dict[str, float]()
    scores_text = args.plan is None and methods.find(args.method).needs != "weights"
    target = args.target(settings)
    reads_text = scores_text or target is not None
    if args.calibration.calibration_sha256 is not None and not reads_text:
        raise ValueError(f"calibration_sha256: given, but {'--plan' if args.plan else args.method} reads no text; leave it out")
    with _hosts.output_folder(args.out, overwrite=args.overwrite) as out:
        with stage("loading", seconds):
            needs_tokenizer = reads_text and not data.is_token_file(args.calibration.calibration)
            model = _devices.load_any(args.devices, args.model, args.dtype, needs_tokenizer=needs_tokenizer)
        with _hosts.alike():
            plan = None if args.plan is None else folder.read_plan(args.plan)
            if plan is None:
                settings = args.settings(model.cfg)
                settings.check(model.cfg)
        _profiles.check(model.cfg, settings, plan)
        tokens = fit_tokens = calibration = goal = None
        if _budget.asked(args.budget):
            with stage("reading the target", seconds):
                goal = _budget.goal(args.budget, only_llama(model.cfg, "target"), settings, args.dtype)
        if reads_text:
            with stage("reading calibration text", seconds):
                calibration, fit_tokens = calibration_tokens(
                    args.calibration, args.reconstruction, settings, model, target, by_method=args.plan is None, goal=goal
                )
                tokens = calibration.tokens
        with stage("pruning", seconds):
            if plan is None:
                pruned = pipeline.prune(
                    model.params, model.cfg, tokens, settings, say, fit_tokens=fit_tokens, goal=goal, progress=progress
                )
            else:
                pruned = pipeline.by_plan(model.params, model.cfg, plan, fit_tokens, target, progress=progress)
        _devices.check(args.devices, pruned.cfg)
        report = None
        if args.plan is None and settings.units == ("rotated",):
            say("note: the residual stream was rotated, so there is no masked model to compare the cut with")
        else:
            with stage("verifying", seconds):
                report = proof.verify(
                    model.params,
                    model.cfg,
                    pruned.params,
                    pruned.cfg,
                    pruned.plan,
                    probe_tokens(tokens, model.cfg),
                    tuple(name for update in pruned.updates for name in update["arrays"]),
                )
        if report is not None and not report.exact:
            raise AssertionError(f"the cut is not exact: {report}; please report this")
        for note in pruned.notes:
            say(f"note: {note}")
        result = summary(model.cfg, pruned, report, seconds)
        budget = {}
        if goal is not None and pruned.met is not None:
            settings = dataclasses.replace(settings, ratio=pruned.met.ratio)
            dense_cfg = only_llama(model.cfg, "target")
            result = _budget.rows(goal, pruned.met, dense_cfg) | result
            budget = {"target": _budget.recorded(goal, pruned.met, dense_cfg)}
        model = model._replace(params=None)  # saving reads the pruned weights alone: the dense ones need not stay in memory
        record = dict(
            plan=json.loads(pruned.plan.to_json()),
            method=dict(name="plan" if args.plan else args.method) | ({} if args.plan else dataclasses.asdict(settings)),
            source=args.model,
            calibration=None if calibration is None else described(calibration, fit_tokens),
            seed=args.calibration.seed,
            versions=folder.versions(),
            metrics=result,
            updates=list(pruned.updates),
            before=model.record,
            **budget,
        )
        with stage("saving", seconds):
            folder.save(out, folder.Model(pruned.params, pruned.cfg, model.tokenizer, str(args.out), record))
            _hosts.by_first(write_scores, out / "scores.npz", pruned.scores)
    return result | {"folder": str(args.out)}


def probe_tokens(tokens: Any, cfg: models.Config) -> Any:
    """Tokens to verify on: of the calibration set, or drawn evenly from the vocabulary where there is none."""
    if tokens is not None:
        return tokens[:2, :64]
    return np.random.default_rng(0).integers(0, cfg.vocab, (2, 64), dtype=np.int32)


def summary(
    cfg: models.Config, pruned: pipeline.Pruned, report: proof.Report | None, seconds: dict[str, float]
) -> dict[str, Any]:
    """The numbers that the command prints."""
    return {
        "decoder parameters before": cfg.decoder_parameters,
        "decoder parameters after": pruned.cfg.decoder_parameters,
        "fraction removed": round(1 - pruned.cfg.decoder_parameters / cfg.decoder_parameters, 4),
        "all parameters before": models.count_parameters(cfg),
        "all parameters after": models.count_parameters(pruned.cfg),
        **({} if report is None else {"largest logit difference, masked and cut": report.difference}),
        "peak memory, MiB": round(peak_memory() / 2**20),
        "notes": list(pruned.notes),
        "seconds": seconds,
    }
