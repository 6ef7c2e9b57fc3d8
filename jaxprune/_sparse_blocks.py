"""What a block is to `jaxprune sparsify`: which matrices read the same, what each reads, what the block passes on."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.models import Config, MambaConfig, Params, embedded, mamba, reads, stream_norm, sublayer
from jaxprune.models._mesh import by_sequence, on_host


class Blocks(NamedTuple):
    """The blocks of an architecture.

    Attributes:
      groups: names of matrices that read the same, in the order in which tokens go through them.
      begin: (parameters, tokens [b, t], configuration) -> the residual stream before the first block, [b, t, d].
      reads: (arrays of a block, first name of a group, stream, configuration) -> what that group reads, [b, t, ...].
      after: first name of the last group of a sublayer -> (arrays of a block, stream before the sublayer, configuration) -> the
        stream after it, which is what later groups are given.
    """

    groups: tuple[tuple[str, ...], ...]
    begin: Callable[[Params, jax.Array, Any], jax.Array]
    reads: Callable[[dict, str, jax.Array, Any], jax.Array]
    after: Mapping[str, Callable[[dict, jax.Array, Any], jax.Array]]


def _llama_reads(p: dict, name: str, x: jax.Array, cfg: Any) -> jax.Array:
    if name in ("o", "down"):
        return reads(p, name, x, cfg)
    return stream_norm(x, p["attn_norm" if name == "q" else "mlp_norm"], cfg)


LLAMA = Blocks(
    (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)),
    embedded,
    _llama_reads,
    {"o": lambda p, x, cfg: sublayer(p, "o", x, cfg), "down": lambda p, x, cfg: sublayer(p, "down", x, cfg)},
)
MAMBA = Blocks(
    (("in_proj",), ("x_proj",), ("dt_proj",), ("out_proj",)),
    mamba.embedded,
    lambda p, name, x, cfg: mamba.inputs(p, x, cfg)[0][name],
    {"out_proj": lambda p, x, cfg: mamba.block(p, x, cfg)[0]},
)


def blocks_of(cfg: Config) -> Blocks:
    """The blocks of a model.

    >>> from jaxprune import models, _sparse_blocks
    >>> cfg = models.MambaConfig(vocab=64, d=32, dt_rank=2, layers=(models.MambaDims(64),))
    >>> [group[0] for group in _sparse_blocks.blocks_of(cfg).groups]
    ['in_proj', 'x_proj', 'dt_proj', 'out_proj']
    """
    return MAMBA if isinstance(cfg, MambaConfig) else LLAMA


def begin(params: Params, batches: Sequence[Any], cfg: Config) -> list[np.ndarray]:
    """The residual stream of all batches before the first block, on the host."""
    return [on_host(blocks_of(cfg).begin(params, jnp.asarray(b), cfg)) for b in batches]


def advance(stream: list[np.ndarray], p: dict, name: str, cfg: Config) -> None:
    """Takes the residual stream of all batches through the sublayer that ends with a group, if one does."""
    if name in blocks_of(cfg).after:
        for at, x in enumerate(stream):
            stream[at] = on_host(_after(p, name, x, cfg))


@functools.partial(jax.jit, static_argnames=("name", "cfg"))
def _after(p, name, x, cfg):
    return blocks_of(cfg).after[name](p, by_sequence(x), cfg)
