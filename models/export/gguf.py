"""GGUF files that llama.cpp loads, whatever the widths of the layers."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune.models import _stored
from jaxprune.models._family import beyond_llama
from jaxprune.models._gguf import PART
from jaxprune.models._gguf_blocks import LEAST_FF, architecture, blocks
from jaxprune.models._gguf_config import PERMUTED
from jaxprune.models._layout import ROTATED, halves
from jaxprune.models.config import LlamaConfig
from jaxprune.models.export._gguf_metadata import add_model, add_tokenizer, rope_problem
from jaxprune.models.export._gguf_tensors import ALIGNMENT, QUANTIZATIONS, Tensor, divisors, ggml_type, tensors, too_narrow
from jaxprune.models.export._gguf_tokenizer import vocabulary
from jaxprune.models.export._plain import cut_heads
from jaxprune.models.types import Params

TYPES = QUANTIZATIONS  # the default first
BLOCK = LEAST_FF  # widths that are multiples of it can have any of them


def problems(cfg: LlamaConfig) -> list[str]:
    """Why this model cannot be a GGUF file, each with what would make it one; empty if it can.

    >>> from jaxprune.models import LayerDims, LlamaConfig
    >>> cfg = LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 48), LayerDims(1, 2, 40)))
    >>> problems(cfg)
    []
    """
    found = []
    if cfg.shortcuts or cfg.norm_width is not None:
        found.append(
            "its residual stream was rotated (shortcuts, norm_width), which llama.cpp cannot compute; prune other units: "
            "--units kv,mlp, layers or sublayers"
        )
    if cfg.sliding_window is not None and cfg.sliding_window < cfg.max_positions:
        found.append(
            f"sliding_window {cfg.sliding_window} is less than max_positions {cfg.max_positions}: llama and deci see all "
            "tokens; set sliding_window to None, or max_positions to it"
        )
    if (rope := rope_problem(cfg)) is not None:
        found.append(rope)
    if beyond := beyond_llama(cfg):
        found.append(f"{', '.join(beyond)} of family {cfg.family}: llama and deci have none; export as hf")
    found += cut_heads(cfg)
    if not blocks(cfg):
        found.append(f"nothing is left of its {len(cfg.layers)} layers; keep at least one sublayer")
    return found


def predicted_bytes(cfg: LlamaConfig, quantization: str) -> int:
    """Bytes of all tensors in the file of this model, their alignment included; the header comes on top.

    Args:
      cfg: the model; it has no `problems`.
      quantization: as in `write`.

    Raises:
      ValueError: an unknown quantization.

    >>> from jaxprune.models import LayerDims, LlamaConfig
    >>> cfg = LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 64),), tie_embeddings=True)
    >>> predicted_bytes(cfg, "f32"), predicted_bytes(cfg, "q8_0")
    (45440, 12352)
    """
    return sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors(cfg, quantization))


def write(
    path: Path,
    params: Params,
    cfg: LlamaConfig,
    tokenizer: Any,
    quantization: str = "f16",
) -> list[str]:
    """Writes a model as one GGUF file that llama.cpp runs and `jaxprune.models.load` reads back.

    The architecture is `llama` (or `qwen2`) if all layers are equal, and otherwise `deci`, which has widths for each layer.
    What GGUF cannot say, such as the position of a gone layer, stands in a key of ours, `jaxprune.config`: `load` returns the
    same configuration, and from an f32 file of float32 parameters the same bits. Memory holds one more tensor at a time. Not
    atomic: a caller that needs it writes beside and renames.

    Args:
      path: the file; it is replaced.
      params: the tree of `init`, without adapters.
      cfg: what `params` was made with.
      tokenizer: a fast tokenizer of transformers (byte-level BPE, or BPE as SentencePiece has it), or None: then programs can
        feed token ids alone.
      quantization: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0, the type of all matrices, embeddings included. Vectors are
        f32; matrices whose rows are no multiple of 32 are f16 where blocks of 32 are needed.

    Returns:
      Notes for the user, one sentence each: that there are such matrices.

    Raises:
      ValueError: the model has `problems`, `params` is not a tree of `cfg` or has values that the type cannot hold, the
        tokenizer cannot be said in GGUF, or the quantization is unknown.
      OSError: the file cannot be written.
    """
    from gguf import GGUFWriter

    if found := problems(cfg):
        raise ValueError(f"this model cannot be a GGUF file: {'; '.join(found)}")
    plan = tensors(cfg, quantization)
    _stored.check_tree(params, cfg)
    words = None if tokenizer is None else vocabulary(tokenizer, cfg)
    values = {(x.name, x.layer): x.values for x in _stored.own(params, cfg)}
    vectors = divisors(cfg)
    out = GGUFWriter(path, architecture(cfg))
    add_model(out, cfg, quantization)
    add_tokenizer(out, words)
    for tensor in plan:
        out.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=ggml_type(tensor.kind))
    with contextlib.closing(out):
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_ti_data_to_file()
        for tensor in plan:
            if tensor.array is None:
                rows = vectors[tensor.name]
            elif (place := (tensor.array, tensor.layer)) in values:
                rows = values[place]()
            else:
                rows = np.broadcast_to(np.float32(0), tensor.shape)
            if tensor.array in ROTATED and architecture(cfg) in PERMUTED:
                rows = rows[halves(len(rows), cfg.head_dim, cfg.head_dim)]
            out.write_tensor_data(_encoded(tensor, rows))
    note = too_narrow(cfg, quantization)
    return [] if note is None else [note]


def _encoded(tensor: Tensor, rows: np.ndarray) -> np.ndarray:
    """The bytes of a tensor, quantised in parts."""
    from gguf import quants

    out = np.empty((len(rows) if rows.ndim > 1 else 1, tensor.row_bytes), np.uint8)
    rows = rows.reshape(len(out), -1)
    step = max(1, PART // rows.shape[1])
    for start in range(0, len(rows), step):
        part = np.ascontiguousarray(rows[start : start + step], np.float32)
        if not np.isfinite(part).all():
            raise ValueError(f"tensor {tensor.name} holds NaN or infinite values; the model is damaged")
        with np.errstate(over="ignore"):
            values = quants.quantize(part, ggml_type(tensor.kind))
        if tensor.kind == "f16" and not np.isfinite(values).all():
            raise ValueError(f"tensor {tensor.name} has values that overflow f16; write bf16 or f32")
        out[start : start + step] = values.view(np.uint8)
    return out
