"""`jaxprune recover`: training of a pruned model, with adapters that are merged at the end or of all weights."""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxprune import _beside, _hosts, _progress, _terminate, data, folder, recovery
from jaxprune.commands import _devices, _distillation
from jaxprune.commands._common import ModelName, Output, check_tokens, flag, peak_memory, say, stage
from jaxprune.commands._compute import Compute
from jaxprune.commands._distillation import Distillation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recover:
    """Train a pruned model: low-rank adapters (LoRA), merged into its weights at the end, or all weights.

    Of a model that `sparsify` wrote, every zero stays zero. Killed at any moment, the same command with --resume goes on from
    the last checkpoint, in OUT.training until the end; SIGTERM writes one and ends with exit status 0.

    Example: jaxprune recover small --data alpaca.json --out better --steps 200 --distill smollm2
    """

    model: ModelName
    data: Annotated[str, flag("SRC")]
    """Instructions (.json or .jsonl with the fields instruction, input, output; responses are learnt) or any text source."""
    out: Annotated[Path, flag("DIR")]
    """Folder to write."""
    steps: Annotated[int, flag("N")] = 100
    """Updates."""
    train: Literal["lora", "full"] = "lora"
    """Low-rank adapters, or all weights: five float32 copies of the model in memory."""
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
    """Type that the weights are read, used and written in. What is trained is float32."""
    resume: bool = False
    """Go on from the last checkpoint."""
    overwrite: bool = False
    """Replace the output folder if it has content."""
    distillation: Distillation = Distillation()
    devices: _devices.Devices = _devices.Devices()
    hosts: _devices.Hosts = _devices.Hosts()
    compute: Compute = Compute()
    output: Output = Output()

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, until the end."""
        return self.out.parent / f"{self.out.name}.training"

    def kept(self) -> str | None:
        """How to go on after an interruption, or None where nothing was kept."""
        return f"{self.checkpoints} is kept; go on with --resume" if _has_checkpoint(self.checkpoints) else None


def run(args: Recover) -> dict[str, Any]:
    """Trains, merges and saves."""
    _check(args)
    seconds: dict[str, float] = {}
    with _hosts.output_folder(args.out, overwrite=args.overwrite) as out:
        with stage("loading", seconds):
            model = _devices.load_any(args.devices, args.model, args.dtype)
            teacher = _distillation.load(args.distillation, args.dtype, args.devices)
        with stage("reading training data", seconds), _hosts.alike():
            training = data.training_batches(
                args.data, model.tokenizer, length=args.length, batch_size=args.batch_size, seed=args.seed
            )
        say(f"{training.kind} data: {training.examples} examples, {training.dropped} dropped")
        with stage("training", seconds), _checkpoints(args.checkpoints):
            adapter, losses = _train(args, model, teacher, training)
        with stage("merging and saving", seconds):
            update = _update(args, model, training, losses)
            record = None if model.record is None else model.record | {"updates": [*model.record.get("updates", ()), update]}
            folder.save(out, model._replace(params=_trained(args, model, adapter), record=record))
    if _hosts.first():
        shutil.rmtree(args.checkpoints, ignore_errors=True)
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


def is_sparse(model: folder.Model) -> bool:
    """Whether the record says that the model was made sparse, so that its zeros have to stay."""
    return model.record is not None and "sparsity" in model.record


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
        if _hosts.first() and not _has_checkpoint(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _has_checkpoint(folder: Path) -> bool:
    return any(path.name.isdecimal() for path in folder.glob("*"))


def _check(args: Recover) -> None:
    """Refuses flags that mean nothing together, before anything is read."""
    for name in ("rank", "alpha") if args.train == "full" else ():
        if getattr(args, name) != Recover.__dataclass_fields__[name].default:
            raise ValueError(f"{name}: {getattr(args, name)} given with --train full, which has no adapters; leave it out")
    _distillation.check(args.distillation, args.model)


def _train(args: Recover, model: folder.Model, teacher: _distillation.Teacher | None, training: data.TrainingData):
    warmup, tx = optimizer(args)
    adapters = dict(rank=args.rank, alpha=args.alpha) if args.train == "lora" else dict(train=args.train)
    settings = {name: getattr(args, name) for name in ("batch_size", "length", "learning_rate", "seed")} | adapters
    settings |= dict(warmup=warmup, data=training.sha256, kind=training.kind, model=[list(dims) for dims in model.cfg.layers])
    alpha = args.alpha if args.train == "lora" else None
    if teacher is None:
        loss, frozen = recovery.lm_loss(model.cfg, alpha=alpha, sparse=is_sparse(model)), model.params
    else:
        loss = _distillation.make_loss(args.distillation, model.cfg, teacher.cfg, alpha, is_sparse(model))
        frozen = recovery.Pair(model.params, teacher.params)

    def batch(step: int) -> dict[str, Any]:
        out = training.batch(step)
        check_tokens(out["tokens"], model.cfg, training.source)
        return _beside.spread(model.params, out)

    with _terminate.noted() as stop, _progress.meter("training", args.steps, "step") as advance:
        return recovery.fit(
            loss,
            frozen,
            _start(args, model),
            batch,
            tx,
            steps=args.steps,
            accumulate=args.accumulate,
            checkpoint_dir=args.checkpoints,
            save_every=args.save_every,
            resume=args.resume,
            settings=settings | _distillation.settings(args.distillation, teacher),
            callback=_shown(advance, args.batch_size * args.length),
            stop=stop,
        )


def _start(args: Recover, model: folder.Model) -> Any:
    """What is trained, before its first update."""
    if args.train == "full":
        return jax.tree.map(lambda x: x.astype(jnp.float32), model.params)
    return recovery.lora.init(jax.random.key(args.seed), model.params, model.cfg, rank=args.rank)


def _trained(args: Recover, model: folder.Model, adapter: Any) -> Any:
    """The model's weights after training, in the types that they had."""
    if args.train == "full":
        return recovery.assemble(model.params, adapter, None, is_sparse(model))
    return recovery.lora.merge(model.params, adapter, alpha=args.alpha, sparse=is_sparse(model), donate=True)


def _shown(advance: Callable[[int, str], None], tokens: int) -> Callable[[int, float], None]:
    """A callback of `fit` that shows the loss and the rate of the last update, whose batch has so many tokens."""
    last = time.monotonic()

    def show(step: int, loss: float) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        advance(step + 1, f"loss {loss:.4g}, {tokens / (last - before):.0f} tokens/s")

    return show


def _update(args: Recover, model: folder.Model, training: data.TrainingData, losses: Any) -> dict[str, Any]:
    flags = {
        f.name: getattr(args, f.name)
        for f in dataclasses.fields(args)
        if f.name not in ("output", "out", "resume", "overwrite", "distillation", "devices", "hosts", "compute")
    }
    flags |= {name: value for name, value in dataclasses.asdict(args.distillation).items() if value is not None}
    paths = jax.tree_util.tree_flatten_with_path(model.params)[0]
    everything = list(dict.fromkeys(path[-1].key for path, _ in paths))
    by = "distillation" if args.distillation.distill else "LoRA" if args.train == "lora" else "training"
    return dict(
        by=by, arrays=list(model.cfg.matrices) if args.train == "lora" else everything, settings=flags, data=training.source,
        sha256=training.sha256, losses=[float(x) for x in losses],
    )  # fmt: skip
