"""GGUF files of the architectures llama, deci, qwen2 and qwen3, in any quantisation that the package `gguf` can undo."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprune.models import _gguf_blocks
from jaxprune.models._gguf_blocks import CONFIG_KEY, Block
from jaxprune.models._gguf_config import FREQUENCIES, LAYER, PERMUTED, TOP, declared, shape_of
from jaxprune.models._layout import ROTATED, WHOLE, Rows, Source, halves
from jaxprune.models.config import LlamaConfig

ARCHITECTURES = ("llama", "deci", "qwen2", "qwen3")
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
    cfg, blocks = declared(path, header.metadata, tensors)
    number = {block.layer: i for i, block in enumerate(blocks)}
    architecture = header.metadata["general.architecture"]
    permuted = tuple(LAYER[n] for n in ROTATED) if architecture in PERMUTED else ()

    def read(name: str, wanted: slice = WHOLE, columns: slice = WHOLE) -> Iterator[tuple[Rows, np.ndarray]]:
        tensor, kind = tensors[name], tensors[name].tensor_type
        # Mapped anew, tensor by tensor: what is read through the map of the whole file would count as memory until the end.
        data = np.memmap(path, tensor.data.dtype, "r", tensor.data_offset, tensor.data.shape)
        rows = len(data)
        step = max(1, PART // max(1, tensor.n_elements // rows)) if data.ndim > 1 else rows
        order = halves(shape_of(tensor)[0], cfg.head_dim, cfg.head_dim) if name.endswith(permuted) else None
        first, last, _ = wanted.indices(rows)
        for start in range(first, last, step):
            part = slice(start, min(start + step, last))
            try:
                values = quants.dequantize(data[part], kind)
            except NotImplementedError:
                raise ValueError(f"{path}: tensor {name} has type {kind.name}, which cannot be dequantised") from None
            yield part if order is None else order[part], values[:, columns] if values.ndim > 1 else values

    added = _added(path, cfg, blocks, read)
    return Source(
        where=str(path),
        cfg=cfg,
        dtype=np.dtype(np.float32),
        shapes={name: shape_of(tensor) for name, tensor in tensors.items()},
        name=lambda name, layer: TOP[name] if layer is None else f"blk.{number[layer]}.{LAYER[name]}",
        read=read,
        spare=lambda name: name in FREQUENCIES or name in added,
    )


def _added(
    path: Path, cfg: LlamaConfig, blocks: list[Block], read: Callable[[str], Iterator[tuple[Rows, np.ndarray]]]
) -> set[str]:
    """The tensors of sublayers that are gone from the model; they must add nothing."""
    out = set()
    for i, block in enumerate(blocks):
        for name in _gguf_blocks.padding(cfg, block):
            tensor = f"blk.{i}.{LAYER[name]}"
            if name in ("o", "down") and any(values.any() for _, values in read(tensor)):
                raise ValueError(
                    f"{path}: tensor {tensor} is not zero, but {CONFIG_KEY} says that its sublayer is gone; remove that key"
                )
            out.add(tensor)
    return out
