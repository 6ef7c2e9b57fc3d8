"""Programs of the stages for models of any size, compiled for arrays that are not there, and what is counted of them."""

import functools
import re
import time
from typing import Any, NamedTuple

import _common
import jax
import jax.numpy as jnp

from jaxprune import models, sharding, sizing
from jaxprune.models import LayerDims, LlamaConfig, decode

BATCH, LENGTH = 2, 256
STAGES = {
    "forward": "token losses, as in evaluation",
    "score": "one update of --method taylor",
    "score, kfac-obs": "one update of the default method",
    "Gram": "the least-squares sums of one sublayer",
    "recover": "one LoRA update",
    "decode": "one token of each sequence behind a cache",
}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (?:\(.*?\)|\S+) ([\w-]+)\(", re.M)


class Program(NamedTuple):
    """What is known of a compiled program.

    Attributes:
      seconds: processor seconds of all cores for tracing and compiling.
      instructions: of the optimised program, loops and fusions counted once.
      products: matrix products among them.
      temporaries: MiB.
    """

    seconds: float
    instructions: int
    products: int
    temporaries: float


def model(layers: int = 8, width: int = 256, vocabulary: int = 8192, shapes: int = 1) -> LlamaConfig:
    """A model whose MLPs are four times as wide as its residual stream; its layers have so many different shapes, in runs."""
    widths = [4 * width - 8 * (i * shapes // layers) for i in range(layers)]
    heads = width // 64
    return LlamaConfig(vocab=vocabulary, d=width, head_dim=32, layers=tuple(LayerDims(heads, 2, f) for f in widths))


@functools.cache
def compiled(stage: str, cfg: LlamaConfig) -> Program:
    """Traces and compiles the program of a stage, in float32, for one device."""
    begin = time.process_time()
    program = _lowered(stage, cfg).compile()
    seconds = time.process_time() - begin
    kinds, memory = _INSTRUCTION.findall(program.as_text()), program.memory_analysis().temp_size_in_bytes
    return Program(seconds, len(kinds), kinds.count("dot"), memory / _common.MIB)


def _lowered(stage: str, cfg: LlamaConfig) -> Any:
    if stage == "decode":
        params = models.shapes(cfg, jnp.dtype("float32"))
        cache = jax.eval_shape(lambda: decode.init_cache(cfg, BATCH, LENGTH))
        return decode.step.lower(params, jax.ShapeDtypeStruct((BATCH,), jnp.int32), 0, cfg, cache)
    name, _, method = stage.partition(", ")
    name = "reconstruct" if name == "Gram" else name
    mesh = sharding.mesh_of("data=1")
    options = dict(batch=BATCH, length=LENGTH, dtype="float32", method=method or "taylor")
    return sizing.lower(cfg, mesh, name, **options)[1]
