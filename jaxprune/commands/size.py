"""`jaxprune size`: whether a stage fits a mesh of accelerators, without having them."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from jaxprune import methods, models, sharding, sizing
from jaxprune._accelerators import ACCELERATORS, USABLE
from jaxprune.commands._common import Output, flag, say, stage
from jaxprune.commands._compute import Compute
from jaxprune.models import LayerDims, LlamaConfig
from jaxprune.models._safetensors import read_json
from jaxprune.models.mamba_config import only_llama

GIB = 2**30
MODELS = {
    "llama-7b": LlamaConfig(vocab=32000, d=4096, head_dim=128, layers=(LayerDims(32, 1, 11008),) * 32),
    "llama-8b": LlamaConfig(vocab=128256, d=4096, head_dim=128, layers=(LayerDims(8, 4, 14336),) * 32, rope_theta=5e5),
    "llama-70b": LlamaConfig(vocab=128256, d=8192, head_dim=128, layers=(LayerDims(8, 8, 28672),) * 80, rope_theta=5e5),
    "smollm2": LlamaConfig(vocab=49152, d=576, head_dim=64, layers=(LayerDims(3, 3, 1536),) * 30, tie_embeddings=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Say what one step of a stage takes on each device of a mesh, and which accelerators it fits.

    The program is compiled for simulated devices and never run, so neither the model nor the accelerators are needed. The
    CPU's compiler lays memory out: that of a GPU or TPU fuses and schedules differently.

    Example: jaxprune size --model-config llama-70b --mesh fsdp=8 --stage score
    """

    model_config: Annotated[str, flag("FILE")]
    """A config.json, a folder with one, llama-7b, llama-8b, llama-70b or smollm2 (135M)."""
    mesh: Annotated[str, flag("AXIS=N,...")] = "data=1"
    """Sizes of the axes data, fsdp and tensor, as in prune."""
    stage: Literal["forward", "score", "reconstruct", "recover"] = "score"
    """forward: losses, as in evaluate; score: one update of the method; reconstruct: the least-squares sums of the widest MLP;
    recover: one LoRA update."""
    method: Annotated[str, flag("NAME")] = "taylor"
    """Whose scores are meant."""
    layers_at_once: Annotated[int | None, flag("N", "all")] = None
    """As in prune, of kfac-obs: the statistics of the first so many layers."""
    batch: Annotated[int, flag("N")] = 8
    """Sequences in a step, in all."""
    length: Annotated[int, flag("T")] = 1024
    """Tokens in a sequence."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the weights."""
    compute: Compute = Compute()
    output: Output = Output()


def run(args: Size) -> dict[str, Any]:
    """Compiles and says what was found."""
    methods.find(args.method)
    cfg, sizes = config(args.model_config), sharding.sizes_of(args.mesh)
    simulate(math.prod(sizes.values()))
    mesh = sharding.mesh_of(args.mesh)
    for note in sharding.replicated(cfg, sizes):
        say(f"note: {note}")
    seconds: dict[str, float] = {}
    with stage("compiling", seconds):
        found = sizing.size(
            cfg,
            mesh,
            args.stage,
            batch=args.batch,
            length=args.length,
            dtype=jnp.dtype(args.dtype),
            method=args.method,
            layers_at_once=args.layers_at_once,
        )
    parts = dict(weights=found.weights, temporaries=found.temporaries, output=found.output)
    parts["other arguments"] = found.arguments + found.beside - found.weights
    received = sum(found.work.collectives.values(), 0.0)
    return {
        "parameters": models.count_parameters(cfg),
        "devices": mesh.size,
        "arguments, GiB": round((found.arguments + found.beside) / GIB, 3),
        "of these weights, GiB": round(found.weights / GIB, 3),
        "temporaries, GiB": round(found.temporaries / GIB, 3),
        "output, GiB": round(found.output / GIB, 3),
        "in all, GiB": round(found.total / GIB, 3),
        "most memory": max(parts, key=lambda name: parts[name]),
        "TFLOPs": round(found.work.flops / 1e12, 3),
        "collectives, GiB": round(received / GIB, 3),
        "most collectives": max(found.work.collectives, key=found.work.collectives.__getitem__, default="none"),
        "accelerators": [_row(name, a, found, received) for name, a in ACCELERATORS.items()],
        "seconds": seconds,
    }


def _row(name: str, a: Any, found: sizing.Size, received: float) -> dict[str, Any]:
    computing, talking = found.work.flops / a.flops, received / a.link
    return {
        "on each": name,
        "memory": f"{found.total / a.bytes:.0%}",
        "fits": "yes" if found.total <= USABLE * a.bytes else "no",
        "computing at peak, s": round(computing, 4),
        "collectives at peak, s": round(talking, 4),
        "longer": "computing" if computing >= talking else "collectives",
    }


def config(given: str) -> LlamaConfig:
    """The configuration of a name, a file or a folder.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not the configuration of a model that is supported.
    """
    if given in MODELS:
        return MODELS[given]
    file = Path(given) / "config.json" if Path(given).is_dir() else Path(given)
    if not file.is_file():
        raise FileNotFoundError(f"model_config: {given} given; name a config.json, a folder or one of {', '.join(MODELS)}")
    return only_llama(models.from_hf_config(read_json(file)), "size")


def simulate(n: int) -> None:
    """Makes JAX simulate `n` devices, if it has not begun and was not told otherwise; `mesh_of` says if that fails."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    try:
        jax.config.update("jax_num_cpu_devices", n)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:
        return  # JAX has begun: its devices are those that there are
