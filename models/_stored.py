"""What a file holds of a model: its tensors in the file's layout, and zeros for biases that it must have."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.models import _hf
from jaxprune.models._layout import ROTATED, file_shape, file_view, halves, parts
from jaxprune.models._mesh import on_host
from jaxprune.models.config import LlamaConfig
from jaxprune.models.mamba_config import MambaConfig
from jaxprune.models.params import shapes
from jaxprune.models.types import Config, Params


class Stored(NamedTuple):
    """One tensor of a file.

    Attributes:
      name: our name of the array, e.g. `q`, or the file's name below the layer of a tensor that holds several.
      layer: number of the layer in the model, or None at the top.
      shape: in the file.
      dtype: of its numbers.
      values: computes them.
    """

    name: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: np.dtype
    values: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


def tensors(params: Params, cfg: Config, config: dict[str, Any]) -> list[Stored]:
    """All tensors of a file with `config` as its `config.json`.

    Raises:
      ValueError: `params` is not a tree of `cfg`.
    """
    check_tree(params, cfg)
    if isinstance(cfg, MambaConfig):
        return list(own(params, cfg))
    table = _hf.table_of(config)
    out = {(tensor.name, tensor.layer): tensor for tensor in (*own(params, cfg), *_padding(params, cfg, config))}
    if table.interleaved:
        for key in [key for key in out if key[0] in ROTATED]:
            order = halves(out[key].shape[0], cfg.head_dim, cfg.rotary_dim)
            out[key] = out[key]._replace(values=functools.partial(_ordered, out[key].values, order))
    for fused, arrays in table.fused.items():
        for layer in sorted({layer for name, layer in out if name == arrays[0] and layer is not None}):
            out[fused, layer] = _joined(fused, [out.pop((name, layer)) for name in arrays])
    return list(out.values())


def _ordered(values: Callable[[], np.ndarray], order: np.ndarray) -> np.ndarray:
    return values()[order]


def _joined(name: str, tensors: list[Stored]) -> Stored:
    shape = (sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:])
    return tensors[0]._replace(name=name, shape=shape, values=lambda: np.concatenate([tensor.values() for tensor in tensors]))


def check_tree(params: Params, cfg: Config) -> None:
    """Raises ValueError unless `params` has the arrays and shapes of `cfg`."""

    def flat(tree: Params) -> dict[str, tuple[int, ...]]:
        return {jax.tree_util.keystr(path): tuple(x.shape) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}

    given, wanted = flat(params), flat(shapes(cfg))
    for key in sorted(given.keys() | wanted.keys()):
        if given.get(key) != wanted.get(key):
            raise ValueError(
                f"params{key}: shape {given.get(key)} given; the configuration says {wanted.get(key)} (None: absent)"
            )


def own(params: Params, cfg: Config) -> Iterator[Stored]:
    """The arrays of the model itself, layer by layer within each array."""
    for path, name, layers, shape in parts(cfg):
        x = params
        for key in path:
            x = x[key]
        for i, layer in enumerate(layers):
            flat = file_shape(name, shape if layer is None else shape[1:])
            yield Stored(name, layer, flat, x.dtype, functools.partial(_values, x, name, None if layer is None else i))


def _values(x: Any, name: str, i: int | None) -> np.ndarray:
    return file_view(name, on_host(x if i is None else x[i]))


def _padding(params: Params, cfg: LlamaConfig, config: dict[str, Any]) -> Iterator[Stored]:
    missing = tuple(name for name in _hf.stored_biases(config) if name not in cfg.biases)
    dtype = params["embed"].dtype
    for layer, dims in enumerate(cfg.layers):
        size, alive = cfg.sizes(dims), dict(o_bias=dims.kv_heads, down_bias=dims.ff)
        for name, letters in dataclasses.replace(cfg, biases=missing).layer_arrays(dims).items():
            if name.endswith("_bias") and alive.get(name, True):
                flat = (math.prod(size[a] for a in letters),)
                yield Stored(name, layer, flat, dtype, functools.partial(np.zeros, flat, dtype))
