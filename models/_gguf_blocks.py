"""The blocks of a GGUF file: which layers it has, and how llama.cpp is told of a layer that lost a sublayer."""

from typing import NamedTuple

from jaxprune.models.config import LayerDims, LlamaConfig

CONFIG_KEY = "jaxprune.config"  # our config.json, in the metadata
LEAST_FF = 32  # the block of all quantised types


class Block(NamedTuple):
    """One block of the file.

    Attributes:
      layer: number of the layer in the model.
      dims: widths of the layer; a sublayer of width 0 is gone.
      stored: widths in the file; where `dims` has 0 and this does not, the sublayer is there with matrices of zeros.
    """

    layer: int
    dims: LayerDims
    stored: LayerDims


def blocks(cfg: LlamaConfig) -> list[Block]:
    """The blocks of a file with this model.

    A layer of which nothing is left is left out. llama.cpp skips a whole layer whose `feed_forward_length` is 0, its attention
    too, so an MLP that is gone is stored as zeros. An attention that is gone is said by `head_count` 0, with two exceptions in
    which it is one head of zeros: llama.cpp reads the size of a head only if the first layer has one, and adds the bias of an
    output projection only after an attention.

    >>> from jaxprune.models import LayerDims, LlamaConfig
    >>> layers = (LayerDims(2, 2, 48), LayerDims(0, 0, 0), LayerDims(1, 2, 0), LayerDims(0, 0, 40))
    >>> for block in blocks(LlamaConfig(vocab=64, d=32, head_dim=8, layers=layers)):
    ...     print(block.layer, block.stored.widths)
    0 (2, 2, 48)
    2 (1, 2, 32)
    3 (0, 0, 40)
    """
    out: list[Block] = []
    for layer, dims in enumerate(cfg.layers):
        if cfg.layer_arrays(dims):
            attention = dims.kv_heads or not ("o" in cfg.biases or not out)
            heads = (dims.kv_heads, dims.q_per_kv) if attention else (1, 1)
            out.append(Block(layer, dims, LayerDims(*heads, dims.ff or LEAST_FF)))
    return out


def architecture(cfg: LlamaConfig) -> str:
    """What llama.cpp calls a model like this: `llama` or `qwen2` if all blocks are equal, and `deci` otherwise."""
    found = blocks(cfg)
    if len({block.stored for block in found}) > 1:
        return "deci"
    whole = all(block.dims == block.stored for block in found)
    plain = dict(cfg.rope_scaling).get("rope_type") not in ("llama3", "longrope")  # divisors: its qwen2 does not read them
    return "qwen2" if cfg.family == "qwen2" and cfg.biases == ("q", "k", "v") and whole and plain else "llama"


def padding(cfg: LlamaConfig, block: Block) -> list[str]:
    """Names of the arrays that a block has in the file and not in the model."""
    return [name for name in cfg.layer_arrays(block.stored) if name not in cfg.layer_arrays(block.dims)]
