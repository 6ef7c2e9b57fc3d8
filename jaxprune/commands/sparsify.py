"""`jaxprune sparsify`: zeros in a model, in one shot, without training."""

import dataclasses
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import jax

from jaxprune import _hosts, data, folder, layer_sparsity, pipeline, sparsify
from jaxprune._json import plain, write_json
from jaxprune._progress import progress
from jaxprune.commands import _devices
from jaxprune.commands._calibration import Calibration, draw, up_to_a_row
from jaxprune.commands._common import ModelName, Output, flag, say, stage
from jaxprune.commands._compute import Compute
from jaxprune.commands._sparse_result import by_matrix, record, summary
from jaxprune.commands._stages import flags_of, kept, opened
from jaxprune.models._safetensors import read_json
from jaxprune.recovery import sparse

SIZES = {True: (128, 2048), False: (64, 512)}  # samples and length, with an accelerator and without


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparsify:
    """Set weights of all attention and MLP matrices, or of Mamba's projections, to zero and fit the others to make up for them.

    The shapes stay; transformers loads the result like any model. Killed at any moment, the same command goes on after the last
    finished layer, in OUT.sparsifying until the end.

    Example: jaxprune sparsify smollm2 --out sparse --nm 2:4
    """

    model: ModelName
    out: Annotated[Path, flag("DIR")]
    """Folder to write."""
    method: Literal["apt", "sparsegpt", "wanda", "magnitude"] = "apt"
    """apt: SparseGPT's mask, then all weights of a row fitted exactly. sparsegpt: columns from left to right. wanda: magnitude
    times the norm of the input, no update. magnitude: no update, either."""
    sparsity: Annotated[float | None, flag("F", "0.5, unless --nm is given")] = None
    """Fraction of zeros in each matrix."""
    layerwise: Literal["uniform", "outliers", "sensitivity"] = "uniform"
    """How --sparsity is spread over layers. outliers: OWL, less of it where more weights stand out. sensitivity: by the
    divergence of next tokens that zeros in a layer alone cause. Both need one pass of the dense model before."""
    spread: Annotated[float | None, flag("F", "0.08")] = None
    """How far a layer may be from --sparsity, with --layerwise."""
    nm: Annotated[str | None, flag("N:M", "none")] = None
    """Of each M consecutive inputs of an output at most N weights stay, such as 2:4 or 4:8."""
    variant: Annotated[Literal["SS", "SM", "MS", "MM"] | None, flag("{SS,SM,MS,MM}", "SM; MM with --nm")] = None
    """Of apt: how the mask is chosen and how the weights are fitted, each for single weights (S) or jointly (M)."""
    block: Annotated[int | None, flag("N", "one fit at the end")] = None
    """Of apt: columns after which the weights are fitted again before the mask goes on."""
    skip: Annotated[str | None, flag("A,B", "none")] = None
    """What stays dense: q, k, v, o, gate, up, down, of Mamba in_proj, x_proj, dt_proj, out_proj; layers.0, layers.0.down."""
    damp: Annotated[float, flag("F")] = 0.01
    """Added to the diagonal of the second moments of the inputs, in means of it."""
    calibration: Annotated[str, flag("SRC")] = "builtin"
    """Text as for `prune`: a file, FILE.jsonl:FIELD, hub:NAME, builtin, self or FILE.npy."""
    samples: Annotated[int | None, flag("N", "128 with an accelerator, 64 without")] = None
    """Sequences."""
    length: Annotated[int | None, flag("T", "2048 with an accelerator, 512 without")] = None
    """Tokens in a sequence."""
    seed: Annotated[int, flag("N")] = 0
    """Of the calibration windows."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights. The fits are in float32 in any case."""
    overwrite: bool = False
    """Replace the output folder if it has content, and what an earlier run with other settings left behind."""
    devices: _devices.Devices = _devices.Devices()
    hosts: _devices.Hosts = _devices.Hosts()
    compute: Compute = Compute()
    output: Output = Output()

    @property
    def checkpoints(self) -> Path:
        """Folder of the layers that are done, until the end."""
        return self.out.parent / f"{self.out.name}.sparsifying"

    @property
    def width(self) -> float:
        """How far a layer may be from the fraction of all; OWL's lambda."""
        return 0.08 if self.spread is None else self.spread

    def kept(self) -> str | None:
        """How to go on after an interruption, or None where nothing was kept."""
        return kept(self.checkpoints)

    def settings(self) -> sparsify.Sparsity:
        """The flags as `sparsify.Sparsity`.

        Raises:
          ValueError: they cannot be used.
        """
        if self.nm is not None and self.sparsity is not None:
            raise ValueError("nm and sparsity: both given; N:M is a sparsity, give one of them")
        pattern = sparse.n_of_m(self.nm) if self.nm else sparse.Pattern(0.5 if self.sparsity is None else self.sparsity)
        if self.layerwise != "uniform" and self.nm is not None:
            raise ValueError(f"layerwise: {self.layerwise} given with nm, which is the same in every layer; give one of them")
        if self.layerwise == "uniform" and self.spread is not None:
            raise ValueError(f"spread: {self.spread} given; it is for --layerwise outliers or sensitivity")
        if self.layerwise != "uniform":
            layer_sparsity.bounds(pattern.fraction, self.width)
        for name in ("samples", "length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}: {value} given; it must be at least 1")
        return sparsify.Sparsity(
            method=self.method,
            pattern=pattern,
            variant=self.variant,
            block=self.block,
            damp=self.damp,
            skip=tuple(self.skip.split(",")) if self.skip else (),
        )


def run(args: Sparsify) -> dict[str, Any]:
    """Sparsifies and saves; returns what happened, for a table."""
    asked, seconds = args.settings(), dict[str, float]()
    given = plain(flags_of(args))
    with _hosts.output_folder(args.out, overwrite=args.overwrite) as out:
        with stage("loading", seconds):
            model = _devices.load_any(
                args.devices, args.model, args.dtype, needs_tokenizer=not data.is_token_file(args.calibration)
            )
        names = sparsify.chosen(model.cfg, asked)
        with stage("reading calibration text", seconds):
            calibration = calibrated(
                Calibration(calibration=args.calibration, samples=args.samples, length=args.length, seed=args.seed), model
            )
        given |= dict(sha256=calibration.sha256, layers=plain(model.cfg.layers))
        with opened(args.checkpoints, given, overwrite=args.overwrite):
            batches = pipeline.batches(calibration.tokens, model.params)
            if args.layerwise != "uniform":
                with stage(f"sparsity of layers, {args.layerwise}", seconds):
                    asked = dataclasses.replace(asked, layers=_layers(args, asked, model, batches, names))
            with stage(f"sparsifying, {args.method}", seconds):
                params, found = sparsify.sparsify(
                    model.params,
                    model.cfg,
                    batches,
                    asked,
                    checkpoints=args.checkpoints,
                    progress=progress,
                )
            for name, matrix in found.items():
                for note in matrix.notes:
                    say(f"note: {name}: {note}")
            result = summary(model, found, seconds)
            with stage("saving", seconds):
                made = record(args, asked, model, calibration, found, result, names)
                folder.save(out, model._replace(params=params, record=made))
    if _hosts.first():
        shutil.rmtree(args.checkpoints, ignore_errors=True)
    rows = by_matrix({name: (m.zeros, m.violations) for name, m in found.items()}, {n: m.error for n, m in found.items()})
    return result | {"folder": str(args.out), "by matrix": rows, "matrices": {n: m._asdict() for n, m in found.items()}}


def _layers(
    args: Sparsify, asked: sparsify.Sparsity, model: folder.Model, batches: list[Any], names: tuple[tuple[str, ...], ...]
) -> tuple[float, ...]:
    """The fraction of each layer, allocated once in a run that is stopped and goes on."""
    file = args.checkpoints / "layers.json"
    if not _hosts.stands(file):
        fraction = asked.pattern.fraction
        found = layer_sparsity.allocated(
            model.params, model.cfg, batches, names, args.layerwise, fraction, args.width, progress=progress
        )
        _hosts.by_first(write_json, file, dict(layers=found))
    return tuple(read_json(file)["layers"])


def calibrated(flags: Calibration, model: folder.Model) -> data.Calibration:
    """The tokens; sizes that were not asked for are those of the papers, or less where there is no accelerator."""
    accelerated = jax.default_backend() != "cpu"
    samples, length = SIZES[accelerated]
    length = min(length, model.cfg.max_positions, up_to_a_row(flags.calibration, length))
    found = draw(flags, model, flags.samples or samples, flags.length or length, flags.samples is None)
    if flags.calibration_sha256 is not None:
        data.check_sha256(flags.calibration_sha256, found.sha256, flags.calibration)
    if not accelerated and (flags.samples is None or flags.length is None):
        say(f"note: no accelerator, so the default is {samples} x {length} tokens; with one it is 128 x 2048, as published")
    return found
