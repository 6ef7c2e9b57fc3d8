"""`jaxprune recover`: LoRA training of a pruned model, merged at the end."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import optax

from jaxprune import _beside, _progress, data, folder, recovery
from jaxprune._files import atomic_folder
from jaxprune.commands import _devices
from jaxprune.commands._common import ModelName, Output, check_tokens, flag, peak_memory, say, stage
from jaxprune.models import axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recover:
    """Train low-rank adapters (LoRA) on a pruned model and merge them into its weights.

    Killed at any moment, the same command with --resume goes on from the last checkpoint, in OUT.training until the end.

    Example: jaxprune recover small --data alpaca.json --out better --steps 200
    """

    model: ModelName
    data: Annotated[str, flag("SRC")]
    """Instructions (.json or .jsonl with the fields instruction, input, output; responses are learnt) or any text source."""
    out: Annotated[Path, flag("DIR")]
    """Folder to write."""
    steps: Annotated[int, flag("N")] = 100
    """Updates."""
    rank: Annotated[int, flag("N")] = 8
    """Rank of the adapters."""
    alpha: Annotated[int, flag("N")] = 16
    """The adapters' product is multiplied by alpha / rank."""
    batch_size: Annotated[int, flag("N")] = 8
    """Sequences in an update."""
    length: Annotated[int, flag("T")] = 128
    """Most tokens in a sequence."""
    learning_rate: Annotated[float, flag("R")] = 2e-4
    """Highest learning rate."""
    warmup: Annotated[int | None, flag("N", "a tenth of the steps")] = None
    """Updates until the highest learning rate, which then falls linearly to zero."""
    accumulate: Annotated[int, flag("N")] = 1
    """Parts that each batch is split into to save memory."""
    save_every: Annotated[int, flag("N")] = 25
    """Updates between checkpoints."""
    seed: Annotated[int, flag("N")] = 0
    """Of the adapters and of the order of the data."""
    dtype: Annotated[Literal["float32", "bfloat16"] | None, flag("{float32,bfloat16}", "as stored")] = None
    """Type of the frozen weights. Adapters are float32."""
    resume: bool = False
    """Go on from the last checkpoint."""
    overwrite: bool = False
    """Replace the output folder if it has content."""
    devices: _devices.Devices = _devices.Devices()
    output: Output = Output()


def run(args: Recover) -> dict[str, Any]:
    """Trains, merges and saves."""
    seconds: dict[str, float] = {}
    checkpoints = args.out.parent / f"{args.out.name}.training"
    with atomic_folder(args.out, overwrite=args.overwrite) as out:
        with stage("loading", seconds):
            model = _devices.load(args.devices, args.model, args.dtype)
        with stage("reading training data", seconds):
            training = data.training_batches(
                args.data, model.tokenizer, length=args.length, batch_size=args.batch_size, seed=args.seed
            )
        say(f"{training.kind} data: {training.examples} examples, {training.dropped} dropped")
        adapter = recovery.lora.init(jax.random.key(args.seed), model.params, model.cfg, rank=args.rank)
        with stage("training", seconds), _checkpoints(checkpoints):
            adapter, losses = _train(args, model, adapter, training, checkpoints)
        with stage("merging and saving", seconds):
            merged = recovery.lora.merge(model.params, adapter, alpha=args.alpha, donate=True)
            record = None if model.record is None else model.record | {
                "updates": [*model.record.get("updates", ()), _update(args, training, losses)]
            }  # fmt: skip
            folder.save(out, model._replace(params=merged, record=record))
    shutil.rmtree(checkpoints, ignore_errors=True)
    return {
        "steps": args.steps,
        "first loss": float(losses[0]),
        "last loss": float(losses[-1]),
        "training data": f"{training.source} ({training.kind}, {training.examples} examples)",
        "peak memory, MiB": round(peak_memory() / 2**20),
        "folder": str(args.out),
        "losses": [{"step": i, "loss": float(x)} for i, x in enumerate(losses)],
        "seconds": seconds,
    }


def optimizer(args: Recover) -> tuple[int, optax.GradientTransformation]:
    """Updates of warmup, and the optimizer that the flags ask for.

    Raises:
      ValueError: a flag is out of range.
    """
    warmup = args.steps // 10 if args.warmup is None else args.warmup
    return warmup, recovery.schedule_and_optimizer(args.learning_rate, args.steps, warmup=warmup)[1]


@contextlib.contextmanager
def _checkpoints(folder: Path) -> Iterator[None]:
    """If training stops before there is a whole checkpoint to go on from, nothing is left of the folder."""
    try:
        yield
    finally:
        if not any(path.name.isdecimal() for path in folder.glob("*")):
            shutil.rmtree(folder, ignore_errors=True)


def _train(args: Recover, model: folder.Model, adapter: Any, training: data.TrainingData, checkpoints: Path):
    warmup, tx = optimizer(args)
    settings = {name: getattr(args, name) for name in ("rank", "alpha", "batch_size", "length", "learning_rate", "seed")}
    settings |= dict(warmup=warmup, data=training.sha256, kind=training.kind, model=[list(dims) for dims in model.cfg.layers])

    def batch(step: int) -> dict[str, Any]:
        out = training.batch(step)
        check_tokens(out["tokens"], model.cfg, training.source)
        return _beside.spread(model.params, out)

    with _progress.meter("training", args.steps, "step") as advance:
        return recovery.fit(
            recovery.lm_loss(model.cfg, alpha=args.alpha),
            model.params,
            adapter,
            batch,
            tx,
            steps=args.steps,
            accumulate=args.accumulate,
            checkpoint_dir=checkpoints,
            save_every=args.save_every,
            resume=args.resume,
            settings=settings,
            callback=lambda step, loss: advance(step + 1, f"loss {loss:.3f}"),
        )


def _update(args: Recover, training: data.TrainingData, losses: Any) -> dict[str, Any]:
    flags = {
        f.name: getattr(args, f.name)
        for f in dataclasses.fields(args)
        if f.name not in ("output", "out", "resume", "overwrite", "devices")
    }
    return dict(
        by="LoRA", arrays=list(axes.MATRICES), settings=flags | {"model": str(args.model)}, data=training.source,
        sha256=training.sha256, losses=[float(x) for x in losses],
    )  # fmt: skip
