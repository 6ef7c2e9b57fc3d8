"""The header of a GGUF file (versions 2 and 3, little-endian): its metadata, and where its tensors are.

`gguf.GGUFReader` makes several memory-mapped arrays for each token of the vocabulary, which takes seconds; this takes 0.1 s.
"""

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # GGUF's type number -> struct's code
STRING, ARRAY = 8, 9


class TensorInfo(NamedTuple):
    """One tensor of the file.

    Attributes:
      shape: row-major.
      kind: a `gguf.GGMLQuantizationType`.
      offset: of its first byte in the file.
      nbytes: its length.
    """

    shape: tuple[int, ...]
    kind: Any
    offset: int
    nbytes: int


class Header(NamedTuple):
    """Metadata by key and tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Reads the header.

    Raises:
      ValueError: it is not a GGUF file, of another version, or truncated, in its header or in its tensors.
    """
    size = path.stat().st_size
    with path.open("rb") as f:
        try:
            if f.read(4) != b"GGUF":
                raise ValueError("it does not start with GGUF")
            version = _scalar(f, "I")
            if version not in (2, 3):
                raise ValueError(f"version {version}; supported are 2 and 3, little-endian")
            n_tensors, n_metadata = _scalar(f, "Q"), _scalar(f, "Q")
            metadata = {_string(f, size): _value(f, _scalar(f, "I"), size) for _ in range(n_metadata)}
            tensors = [_tensor(f, size) for _ in range(n_tensors)]
            alignment = metadata.get("general.alignment", 32)
            start = -(-f.tell() // alignment) * alignment
            placed = {name: info._replace(offset=info.offset + start) for name, info in tensors}
            if short := [name for name, info in placed.items() if info.offset + info.nbytes > size]:
                raise ValueError(f"the file ends before tensor {short[0]} does")
        except (struct.error, ValueError) as e:
            raise ValueError(f"{path}: not a complete GGUF file ({e}); copy or download it again") from None
    return Header(metadata, placed)


def _scalar(f: BinaryIO, code: str) -> Any:
    return struct.unpack(f"<{code}", f.read(struct.calcsize(code)))[0]


def _bytes(f: BinaryIO, n: int, size: int) -> bytes:
    if f.tell() + n > size:
        raise ValueError("the file ends inside its header")
    return f.read(n)


def _string(f: BinaryIO, size: int) -> str:
    return _bytes(f, _scalar(f, "Q"), size).decode()


def _value(f: BinaryIO, kind: int, size: int) -> Any:
    if kind in SCALARS:
        return _scalar(f, SCALARS[kind])
    if kind == STRING:
        return _string(f, size)
    if kind != ARRAY:
        raise ValueError(f"metadata of type {kind}")
    item, n = _scalar(f, "I"), _scalar(f, "Q")
    if item in SCALARS:
        code = f"<{n}{SCALARS[item]}"
        return list(struct.unpack(code, _bytes(f, n * struct.calcsize(f"<{SCALARS[item]}"), size)))
    return [_value(f, item, size) for _ in range(n)]


def _tensor(f: BinaryIO, size: int) -> tuple[str, TensorInfo]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name = _string(f, size)
    shape = tuple(reversed([_scalar(f, "Q") for _ in range(_scalar(f, "I"))]))
    kind = GGMLQuantizationType(_scalar(f, "I"))
    block, length = GGML_QUANT_SIZES[kind]
    return name, TensorInfo(shape, kind, _scalar(f, "Q"), math.prod(shape) // block * length)
