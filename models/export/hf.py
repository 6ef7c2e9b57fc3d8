"""Profile `hf`: a folder that transformers loads as LLaMA, Mistral or Qwen2, without code of ours."""

from pathlib import Path
from typing import Any

from jaxprune.models import _hf, _stored, checkpoint
from jaxprune.models.config import LlamaConfig
from jaxprune.models.export._plain import beyond_padding, is_plain, shapes_of, uniform, words
from jaxprune.models.params import shapes
from jaxprune.models.types import Params


def problems(cfg: LlamaConfig) -> list[str]:
    """Why this model is not a `LlamaForCausalLM`, `MistralForCausalLM` or `Qwen2ForCausalLM`; empty if it is one.

    Layers of which nothing is left are no obstacle: the file has fewer layers.

    Args:
      cfg: the model.

    Returns:
      One message for each obstacle, with the layers, their widths and what would remove it.

    >>> from jaxprune.models import LayerDims, LlamaConfig
    >>> from jaxprune.models.export import hf
    >>> equal, wide = LayerDims(2, 2, 40), LayerDims(2, 2, 48)
    >>> hf.problems(LlamaConfig(vocab=64, d=32, head_dim=8, layers=(equal, equal)))
    []
    >>> print(*hf.problems(LlamaConfig(vocab=64, d=32, head_dim=8, layers=(equal, wide, equal))))
    layers have 2 different shapes (layers 0, 2: 2 KV heads x 2 query heads, 40 channels; layer 1: 2 KV heads x 2 query heads, \
48 channels); the smallest uniform shape that holds them all is 2 KV heads x 2 query heads, 48 channels: export as hf-padded, \
or prune with --for hf
    """
    if is_plain(cfg):
        return []
    why = beyond_padding(cfg)
    layers, shown = shapes_of(cfg)
    shape = uniform(cfg)
    cure = "export as hf-custom" if why or shape is None else f"{words(shape)}: export as hf-padded, or prune with --for hf"
    if len(layers) > 1:
        fits = "" if why or shape is None else "the smallest uniform shape that holds them all is "
        why.append(f"layers have {len(layers)} different shapes ({shown}); {fits}{cure}")
    elif layers and not why:
        (dims,) = layers
        reason = (
            f"all layers have {words(dims)}"
            if not dims.kv_heads or not dims.ff or dims.pairs is not None
            else f"{dims.kv_heads * dims.q_per_kv} heads do not divide the hidden size {cfg.d}, as LlamaForCausalLM wants it, "
            f"and the other classes do not have biases of {', '.join(cfg.biases)}"
        )
        why.append(f"{reason}; the smallest shape that fits is {cure}")
    return why


def write(folder: str | Path, params: Params, cfg: LlamaConfig, tokenizer: Any = None) -> None:
    """Writes the folder as `jaxprune.models.save` does.

    Args:
      folder, params, cfg, tokenizer: as in `save`.

    Raises:
      ValueError: `problems(cfg)` is not empty, or `params` is not a tree of `cfg`.
    """
    refuse("hf", problems(cfg))
    checkpoint.save(folder, params, cfg, tokenizer)


def predicted_bytes(cfg: LlamaConfig, dtype: Any) -> int:
    """Bytes of the tensors in the file, with the biases that the family stores and this model does not have, as zeros.

    Args:
      cfg: the model.
      dtype: of all its parameters.

    >>> from jaxprune.models import LayerDims, LlamaConfig
    >>> from jaxprune.models.export import hf
    >>> hf.predicted_bytes(LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 40),)), "bfloat16")
    22208
    """
    return sum(tensor.nbytes for tensor in _stored.tensors(shapes(cfg, dtype), cfg, _hf.to_hf_config(cfg)))


def refuse(profile: str, found: list[str]) -> None:
    """Raises ValueError if there are problems, with all of them in one line."""
    if found:
        raise ValueError(f"export as {profile}: {'; '.join(found)}")
