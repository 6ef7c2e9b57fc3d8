"""Between the arrays of a model and the tensors of a file: every file stores matrices as [out, in] and vectors flat."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from jaxprune.models import axes
from jaxprune.models.params import shapes
from jaxprune.models.types import Config, Params

A = TypeVar("A", np.ndarray, jax.Array)
Place = Callable[[tuple[str, ...], Any], jax.Array]  # (path, an array or `Unread`)
Rows = slice | np.ndarray
BLOCK = 64
WHOLE = slice(None)
AS_STORED = ("embed", "A_log")  # matrices whose rows are the file's rows
TRANSPOSED = ("head", *axes.MATRICES, *axes.MAMBA_MATRICES, *axes.SHORTCUTS)  # their rows are the file's columns
ROTATED = ("q", "k", "q_bias", "k_bias")  # the arrays whose rows are dimensions of heads that rotate


class Source(NamedTuple):
    """The tensors of a checkpoint, whatever its format.

    Attributes:
      where: what error messages call it.
      cfg: the model.
      dtype: the narrowest type that holds every tensor.
      shapes: tensor name -> shape, row-major.
      name: (array name, layer number or None) -> tensor name.
      read: (tensor name, rows, columns) -> that much of it, as (rows of the tensor as Hugging Face orders them, their values);
        rows are those of whole heads.
      spare: may a tensor that the model has no place for be ignored?
    """

    where: str
    cfg: Config
    dtype: np.dtype
    shapes: dict[str, tuple[int, ...]]
    name: Callable[[str, int | None], str]
    read: Callable[[str, slice, slice], Iterator[tuple[Rows, np.ndarray]]]
    spare: Callable[[str], bool]


def file_view(name: str, x: A) -> A:
    """The array `name` of one layer as a file stores it; writing to it writes to `x`, if `x` is a contiguous numpy array.

    >>> import numpy as np
    >>> from jaxprune.models._layout import file_view
    >>> file_view("o", np.zeros((3, 2, 8, 64))).shape  # kghd
    (64, 48)
    """
    if name in AS_STORED:
        return x
    if name == "conv1d":
        return x[:, None]
    if name not in TRANSPOSED:
        return x.reshape(-1)
    inputs = len(axes.INPUT.get(name, "d"))
    return x.reshape(math.prod(x.shape[:inputs]), -1).T


def file_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of `file_view`."""
    return file_view(name, np.broadcast_to(np.float32(0), shape)).shape


def halves(rows: int, head_dim: int, rotary_dim: int) -> np.ndarray:
    """Where the rows of a file belong that has the two dimensions of a rotary pair beside each other.

    Here they are half of `rotary_dim` apart, and dimensions that do not rotate follow.

    >>> from jaxprune.models._layout import halves
    >>> halves(8, 8, 6)
    array([0, 3, 1, 4, 2, 5, 6, 7])
    """
    head = np.r_[np.arange(rotary_dim).reshape(2, -1).T.reshape(-1), np.arange(rotary_dim, head_dim)]
    return (np.arange(0, rows, head_dim)[:, None] + head).reshape(-1)


def parts(cfg: Config) -> Iterator[tuple[tuple[str, ...], str, list[int | None], tuple[int, ...]]]:
    """For each array of the parameters: its path, its name, the layers that it stacks ([None] at the top), its shape."""
    runs = {run.name: run for run in cfg.runs}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(shapes(cfg))[0]:
        path = tuple(k.key for k in keys)
        run = runs.get(path[0])
        layers: list[int | None] = [None] if run is None else [*range(run.start, run.start + run.length)]
        yield path, path[-1], layers, leaf.shape


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array that starts at a multiple of 64 bytes, whose memory `jax.device_put` takes over on the CPU."""
    n = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(n + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + n].view(dtype).reshape(shape)


def check_names(source: Source) -> None:
    """Raises ValueError unless the file has the tensors of the model, in its shapes, and no others."""
    wanted = {}
    for _, name, layers, shape in parts(source.cfg):
        for layer in layers:
            wanted[source.name(name, layer)] = file_shape(name, shape if layer is None else shape[1:])
    if missing := [n for n in wanted if n not in source.shapes]:
        raise ValueError(f"{source.where}: tensor {missing[0]} is missing ({len(missing)} of {len(wanted)} are)")
    for name, shape in wanted.items():
        if source.shapes[name] != shape:
            raise ValueError(f"{source.where}: tensor {name} has shape {source.shapes[name]}; its configuration says {shape}")
    if extra := sorted(n for n in source.shapes if n not in wanted and not source.spare(n)):
        raise ValueError(
            f"{source.where}: tensor {extra[0]} has no place in a model of family {source.cfg.family} "
            f"({len(extra)} such tensors); remove them or use a checkpoint of that architecture"
        )


def finite(where: str, name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`values` in `dtype`; raises ValueError on NaN, infinities and overflow."""
    with np.errstate(over="ignore"):
        out = values.astype(dtype, copy=False)
    if not np.isfinite(out).all():
        if np.isfinite(values).all():
            raise ValueError(f"{where}: tensor {name} has values that overflow {dtype}; load it as bfloat16 or float32")
        raise ValueError(f"{where}: tensor {name} holds NaN or infinite values; the checkpoint is damaged")
    return out


def _copy(view: np.ndarray, rows: Rows, values: np.ndarray) -> None:
    # A matrix is transposed on the way; in blocks of rows both sides stay in the cache, which is 4 times faster at 4096 x 4096.
    for i in range(0, len(values), BLOCK):
        block = values[i : i + BLOCK]
        start = i if isinstance(rows, np.ndarray) else i + (rows.start or 0)
        view[rows[i : i + BLOCK] if isinstance(rows, np.ndarray) else slice(start, start + len(block))] = block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unread:
    """An array of a model in its file: `x[slices]`, a slice an axis, reads that part; `np.asarray(x)` reads it whole.

    Attributes:
      source: the checkpoint.
      name: of the array.
      layers: that it stacks; [None] at the top.
      shape, dtype: of the array.
    """

    source: Source
    name: str
    layers: list[int | None]
    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        stacked = self.layers != [None]
        read = [s if i < stacked or i - stacked in _leading(self.name) else WHOLE for i, s in enumerate(index)]
        spans = [range(n)[s] for s, n in zip(read, self.shape, strict=True)]
        out = aligned(tuple(map(len, spans)), self.dtype)
        for i, layer in enumerate(self.layers[index[0]] if stacked else self.layers):
            self._fill(out[i] if stacked else out, layer, spans[stacked:], self.shape[stacked:])
        rest = tuple(WHOLE if r is s else s for r, s in zip(read, index, strict=True))
        return out if rest == (WHOLE,) * len(rest) else out[rest]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[(WHOLE,) * len(self.shape)].astype(self.dtype if dtype is None else dtype, copy=False)

    def _fill(self, out: np.ndarray, layer: int | None, spans: list[range], shape: tuple[int, ...]) -> None:
        """Reads what `spans` say of a layer's axes."""
        leading = _leading(self.name)[:: -1 if self.name in TRANSPOSED else 1]  # as the file's axes follow each other
        sizes = [(spans[i], n // shape[i]) for i, n in zip(leading, file_shape(self.name, shape), strict=False)]
        rows, columns = ([slice(span.start * n, span.stop * n) for span, n in sizes] + [WHOLE])[:2]
        view, tensor = file_view(self.name, out), self.source.name(self.name, layer)
        for where, values in self.source.read(tensor, rows, columns):
            here = where - rows.start if isinstance(where, np.ndarray) else slice(where.start - rows.start, None)
            _copy(view, here, finite(self.source.where, tensor, values, self.dtype))


def _leading(name: str) -> tuple[int, ...]:
    """Of the axes that a file makes one, the first: a part along it is a part of the file's axis in one piece."""
    if name in AS_STORED:
        return 0, 1
    if name not in TRANSPOSED:
        return (0,)
    return 0, len(axes.INPUT.get(name, "d"))


def assemble(source: Source, dtype: Any, place: Place) -> Params:
    """The parameters, stacked run by run; at any time at most one array exists twice, and only if `place` copies it."""
    check_names(source)
    dtype = np.dtype(source.dtype if dtype is None else dtype)
    params: Params = {}
    for path, name, layers, shape in parts(source.cfg):
        branch = params
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[name] = place(path, Unread(source=source, name=name, layers=layers, shape=shape, dtype=dtype))
    return params
