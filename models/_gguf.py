"""GGUF files of the architectures llama, qwen2 and qwen3, in any quantisation that the package `gguf` can undo."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprune.models import axes
from jaxprune.models._families import FAMILIES
from jaxprune.models._gguf_rope import scaling
from jaxprune.models._layout import ROTATED, Rows, Source, halves
from jaxprune.models.config import LayerDims, LlamaConfig

ARCHITECTURES = ("llama", "qwen2", "qwen3")
TOP = dict(embed="token_embd.weight", norm="output_norm.weight", head="output.weight")
LAYER = dict(
    attn_norm="attn_norm.weight",
    mlp_norm="ffn_norm.weight",
    **{n: f"attn_{w}.weight" for n, w in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))},
    **{n: f"ffn_{n}.weight" for n in ("gate", "up", "down")},
    **{n: f"attn_{n}.weight" for n in axes.QK_NORMS},
)
LAYER |= {f"{n}_bias": LAYER[n].replace("weight", "bias") for n in ("q", "k", "v", "o", "gate", "up", "down")}
FREQUENCIES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
PART = 1 << 22  # numbers that are dequantised at a time


class Header(NamedTuple):
    """Metadata by key, and tensors, each a `gguf.ReaderTensor` mapped from the file, by name."""

    metadata: dict[str, Any]
    tensors: dict[str, Any]


def open_header(path: Path) -> Header:
    """The header of a GGUF file.

    Raises:
      ValueError: it is damaged, or its architecture is not supported.
    """
    file = path.stat()
    header = _read_header(path, file.st_mtime_ns, file.st_size)
    architecture = header.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture {architecture!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    return header


@functools.lru_cache(maxsize=1)  # it takes seconds; the model and the tokenizer are both loaded from it
def _read_header(path: Path, modified: int, size: int) -> Header:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        if reader.byte_order == "S":
            raise ValueError("it is big-endian")
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, LookupError) as e:  # how the reader meets bytes that are no header, or end too early
        raise ValueError(f"{path}: not a complete GGUF file ({e}); copy or download it again") from None
    return Header(metadata, {tensor.name: tensor for tensor in reader.tensors})


def open_file(path: Path) -> Source:
    """A GGUF file as a source of tensors.

    Raises:
      ValueError: as `open_header`, or a setting or a tensor type that is not supported.
    """
    from gguf import quants

    header = open_header(path)
    tensors = header.tensors
    cfg = _config(path, header)
    permuted = tuple(LAYER[n] for n in ROTATED) if cfg.family == "llama" else ()

    def read(name: str) -> Iterator[tuple[Rows, np.ndarray]]:
        tensor, kind = tensors[name], tensors[name].tensor_type
        # Mapped anew, tensor by tensor: what is read through the map of the whole file would count as memory until the end.
        data = np.memmap(path, tensor.data.dtype, "r", tensor.data_offset, tensor.data.shape)
        rows = len(data)
        step = max(1, PART // max(1, tensor.n_elements // rows)) if data.ndim > 1 else rows
        order = halves(_shape(tensor)[0], cfg.head_dim, cfg.head_dim) if name.endswith(permuted) else None
        for start in range(0, rows, step):
            part = slice(start, start + step)
            try:
                values = quants.dequantize(data[part], kind)
            except NotImplementedError:
                raise ValueError(f"{path}: tensor {name} has type {kind.name}, which cannot be dequantised") from None
            yield part if order is None else order[part], values

    return Source(
        where=str(path),
        cfg=cfg,
        dtype=np.dtype(np.float32),
        shapes={name: _shape(tensor) for name, tensor in tensors.items()},
        name=lambda name, layer: TOP[name] if layer is None else f"blk.{layer}.{LAYER[name]}",
        read=read,
        spare=lambda name: name in FREQUENCIES,
    )


def _config(path: Path, header: Header) -> LlamaConfig:
    metadata, tensors = header
    family = metadata["general.architecture"]

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{family}.{key}", default)
        if value is None:
            raise ValueError(f"{path}: {family}.{key} is missing from the metadata; the file is damaged")
        return value

    def per_layer(key: str, default: Any = None) -> list[int]:
        value = get(key, default)
        return [int(v) for v in value] if isinstance(value, list) else [int(value)] * n

    if get("expert_count", 0):
        raise ValueError(f"{path}: a mixture of {get('expert_count')} experts is not supported; supported are dense models")
    n, d = get("block_count"), get("embedding_length")
    heads = per_layer("attention.head_count")
    kv_heads, ff = per_layer("attention.head_count_kv", heads), per_layer("feed_forward_length")
    head_dim = get("attention.key_length", d // max(heads))
    rotated, value_dim = get("rope.dimension_count", head_dim), get("attention.value_length", head_dim)
    if not head_dim == rotated == value_dim:
        raise ValueError(
            f"{path}: heads of {head_dim} (keys), {value_dim} (values), {rotated} (rotated); supported is one size"
        )
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{path}: tensor token_embd.weight is missing")
    layers = []
    for i, (h, k, f) in enumerate(zip(heads, kv_heads, ff, strict=True)):
        if h and (not k or h % k):
            raise ValueError(f"{path}: layer {i} has {h} heads for {k} key/value heads; the first must be a multiple")
        layers.append(LayerDims(k, h // k, f) if h else LayerDims(0, 0, f))
    names = {name.split(".", 2)[-1] for name in tensors if name.startswith("blk.")}
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    cfg = LlamaConfig(
        vocab=_shape(tensors["token_embd.weight"])[0],
        d=d,
        head_dim=head_dim,
        layers=tuple(layers),
        norm_eps=_decimal(get("attention.layer_norm_rms_epsilon")),
        rope_theta=_decimal(get("rope.freq_base", 10000.0)),
        max_positions=get("context_length"),
        tie_embeddings="output.weight" not in tensors,
        biases=tuple(n for n in ("q", "k", "v", "o", "gate", "up", "down") if LAYER[f"{n}_bias"] in names),
        family=family,
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_ids=() if eos is None else (eos,),
        pad_id=metadata.get("tokenizer.ggml.padding_token_id"),
        **FAMILIES[family].fixed,
    )
    factors = {name: _vector(path, name, tensors[name]) for name in FREQUENCIES if name in tensors}
    return dataclasses.replace(cfg, rope_scaling=scaling(path, lambda key: metadata.get(f"{family}.rope.{key}"), factors, cfg))


def _decimal(x: float) -> float:
    return float(str(np.float32(x)))  # 1e-05, not 9.999999747378752e-06


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(reversed(tensor.shape.tolist()))  # GGUF counts from the innermost axis


def _vector(path: Path, name: str, tensor: Any) -> np.ndarray:
    if tensor.tensor_type.name != "F32":
        raise ValueError(f"{path}: tensor {name} has type {tensor.tensor_type.name}; supported is F32")
    return np.array(tensor.data)
