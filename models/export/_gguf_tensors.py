"""The tensors of a GGUF file: their names, types and bytes, without their values."""

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxprune.models import _rope
from jaxprune.models._gguf_blocks import LEAST_FF, blocks
from jaxprune.models._gguf_config import LAYER, TOP
from jaxprune.models._layout import file_shape
from jaxprune.models.config import LlamaConfig

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

ALIGNMENT = 32
QUANTIZATIONS = ("f16", "f32", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
FALLBACK = "f16"  # of a matrix whose rows are no whole number of blocks


class Tensor(NamedTuple):
    """One tensor of the file.

    Attributes:
      name: in the file.
      array: our name of the array, or None for divisors of rotary frequencies.
      layer: number of the layer in the model, or None at the top.
      shape: in the file, row-major.
      kind: its type, one of `QUANTIZATIONS`.
    """

    name: str
    array: str | None
    layer: int | None
    shape: tuple[int, ...]
    kind: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of a matrix, or of a vector."""
        from gguf import GGML_QUANT_SIZES

        numbers, size = GGML_QUANT_SIZES[ggml_type(self.kind)]
        return self.shape[-1] // numbers * size

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape[:-1]) * self.row_bytes


def ggml_type(quantization: str) -> "GGMLQuantizationType":
    """The type of the package `gguf` of that name; raises ValueError if it is none of `QUANTIZATIONS`."""
    from gguf import GGMLQuantizationType

    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization {quantization!r} given; allowed are {', '.join(QUANTIZATIONS)}")
    return GGMLQuantizationType[quantization.upper()]


def tensors(cfg: LlamaConfig, quantization: str) -> list[Tensor]:
    """All tensors of a file with this model, in the file's order."""
    from gguf import GGML_QUANT_SIZES

    step = GGML_QUANT_SIZES[ggml_type(quantization)][0]

    def tensor(name: str, array: str, layer: int | None, axes: str, size: dict[str, int]) -> Tensor:
        shape = file_shape(array, tuple(size[a] for a in axes))
        kind = "f32" if len(shape) == 1 else FALLBACK if shape[-1] % step else quantization
        return Tensor(name, array, layer, shape, kind)

    top = [tensor(TOP[n], n, None, axes, cfg.sizes()) for n, axes in cfg.top_arrays().items()]
    vectors = [Tensor(name, None, None, x.shape, "f32") for name, x in divisors(cfg).items()]
    in_blocks = [
        tensor(f"blk.{i}.{LAYER[n]}", n, block.layer, axes, cfg.sizes(block.stored))
        for i, block in enumerate(blocks(cfg))
        for n, axes in cfg.layer_arrays(block.stored).items()
    ]
    return [*vectors, *top, *in_blocks]


def too_narrow(cfg: LlamaConfig, quantization: str) -> str | None:
    """Says which matrices cannot have this type and have `FALLBACK` instead, or None if all can."""
    found = tensors(cfg, quantization)
    narrow = [t for t in found if len(t.shape) > 1 and t.kind != quantization]
    if not narrow:
        return None
    matrices = sum(len(t.shape) > 1 for t in found)
    first = narrow[0]
    return (
        f"{len(narrow)} of {matrices} matrices are stored as {FALLBACK} instead of {quantization}, e.g. {first.name} with rows "
        f"of {first.shape[-1]} numbers: {quantization} needs multiples of {LEAST_FF} (prune with --multiple-of {LEAST_FF})"
    )


def divisors(cfg: LlamaConfig) -> dict[str, np.ndarray]:
    """What the rotary frequencies are divided by, float32[h/2], by the name of its tensor: `llama3` and `longrope` have it."""
    s = dict(cfg.rope_scaling)
    if s.get("rope_type") == "llama3":
        plain = cfg.rope_theta ** -(np.arange(0, cfg.head_dim, 2) / cfg.head_dim)
        return {"rope_freqs.weight": (plain / _rope.frequencies(cfg, 1)[0]).astype(np.float32)}
    if s.get("rope_type") == "longrope":
        return {f"rope_factors_{n}.weight": np.array(s[f"{n}_factor"], np.float32) for n in ("long", "short")}
    return {}
