"""The configuration of a model in the metadata of a GGUF file."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune.models import _hf, axes
from jaxprune.models._families import FAMILIES
from jaxprune.models._gguf_blocks import CONFIG_KEY, Block, blocks
from jaxprune.models._gguf_rope import scaling
from jaxprune.models.config import LayerDims, LlamaConfig
from jaxprune.models.mamba_config import only_llama

PERMUTED = ("llama", "deci")  # these rotate neighbouring dimensions of queries and keys
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


def declared(path: Path, metadata: dict[str, Any], tensors: dict[str, Any]) -> tuple[LlamaConfig, list[Block]]:
    """The model in a file, and its blocks.

    What jaxprune wrote has a key of its own, `jaxprune.config`, with all that GGUF cannot say; it must agree with the rest.

    Args:
      path: for messages.
      metadata: by key.
      tensors: `gguf.ReaderTensor`s by name.

    Raises:
      ValueError: a setting that is missing or not supported, or two descriptions that disagree.
    """
    seen = stated(path, metadata, tensors)
    if CONFIG_KEY not in metadata:
        return seen, [Block(i, dims, dims) for i, dims in enumerate(seen.layers)]
    try:
        cfg = only_llama(_hf.from_hf_config(json.loads(metadata[CONFIG_KEY])), "GGUF")
    except ValueError as e:
        raise ValueError(f"{path}: {CONFIG_KEY} in the metadata cannot be read ({e}); remove that key") from None
    found = blocks(cfg)
    for field in ("vocab", "d", "head_dim", "norm_eps", "rope_theta", "max_positions", "tie_embeddings"):
        ours, theirs = getattr(cfg, field), getattr(seen, field)
        if np.float32(ours) != np.float32(theirs):
            raise _disagree(path, field, ours, theirs)
    if (stored := tuple(block.stored for block in found)) != seen.layers:
        raise _disagree(path, "layers", stored, seen.layers)
    return cfg, found


def _disagree(path: Path, field: str, ours: Any, theirs: Any) -> ValueError:
    return ValueError(
        f"{path}: {CONFIG_KEY} in the metadata says {field} {ours}, and the keys of GGUF {theirs}: the file was changed after "
        "jaxprune wrote it; remove that key"
    )


def stated(path: Path, metadata: dict[str, Any], tensors: dict[str, Any]) -> LlamaConfig:
    """The model as the keys that llama.cpp reads describe it; arguments as in `declared`."""
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
    head_dim = get("attention.key_length", d // (max(heads) or 1))
    rotated, value_dim = get("rope.dimension_count", head_dim), get("attention.value_length", head_dim)
    if not head_dim == rotated == value_dim:
        raise ValueError(
            f"{path}: heads of {head_dim} (keys), {value_dim} (values), {rotated} (rotated); supported is one size"
        )
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{path}: tensor token_embd.weight is missing")
    layers = []
    for i, (h, k, f) in enumerate(zip(heads, kv_heads, ff, strict=True)):
        if h and not f:
            raise ValueError(f"{path}: layer {i} has heads and no MLP; llama.cpp skips such a layer, so what it means is open")
        if h and (not k or h % k):
            raise ValueError(f"{path}: layer {i} has {h} heads for {k} key/value heads; the first must be a multiple")
        layers.append(LayerDims(k, h // k, f) if h else LayerDims(0, 0, f))
    names = {name.split(".", 2)[-1] for name in tensors if name.startswith("blk.")}
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    cfg = LlamaConfig(
        vocab=shape_of(tensors["token_embd.weight"])[0],
        d=d,
        head_dim=head_dim,
        layers=tuple(layers),
        norm_eps=_decimal(get("attention.layer_norm_rms_epsilon")),
        rope_theta=_decimal(get("rope.freq_base", 10000.0)),
        max_positions=get("context_length"),
        tie_embeddings="output.weight" not in tensors,
        biases=tuple(n for n in ("q", "k", "v", "o", "gate", "up", "down") if LAYER[f"{n}_bias"] in names),
        family=family if family in FAMILIES else "llama",
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_ids=() if eos is None else (eos,),
        pad_id=metadata.get("tokenizer.ggml.padding_token_id"),
        **(FAMILIES[family].fixed if family in FAMILIES else {}),
    )
    factors = {name: _vector(path, name, tensors[name]) for name in FREQUENCIES if name in tensors}
    return dataclasses.replace(cfg, rope_scaling=scaling(path, lambda key: metadata.get(f"{family}.rope.{key}"), factors, cfg))


def _decimal(x: float) -> float:
    return float(str(np.float32(x)))  # 1e-05, not 9.999999747378752e-06


def shape_of(tensor: Any) -> tuple[int, ...]:
    """Shape of a `gguf.ReaderTensor`, row-major."""
    return tuple(reversed(tensor.shape.tolist()))  # GGUF counts from the innermost axis


def _vector(path: Path, name: str, tensor: Any) -> np.ndarray:
    if tensor.tensor_type.name != "F32":
        raise ValueError(f"{path}: tensor {name} has type {tensor.tensor_type.name}; supported is F32")
    return np.array(tensor.data)
