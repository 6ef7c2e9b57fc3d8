"""Profile `hf-custom`: a folder with layers of any widths and the code that transformers runs it with.

`modeling_jaxprune.py` beside the weights builds each layer at its own width, with the attention, masks, caches and `generate`
of transformers 4.57 and 5. Loading runs code from the folder, so it must be allowed::

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

A model that transformers' own classes can be (`jaxprune.models.export.hf`) is written without that file and needs no
permission.
"""

from pathlib import Path
from typing import Any

from jaxprune.models import checkpoint
from jaxprune.models._family import beyond_llama
from jaxprune.models.config import LlamaConfig
from jaxprune.models.export import hf
from jaxprune.models.types import Params


def problems(cfg: LlamaConfig) -> list[str]:
    """Why transformers cannot run this model even with our code; empty if it can.

    >>> from jaxprune.models import LayerDims, LlamaConfig
    >>> from jaxprune.models.export import hf_custom
    >>> layers = (LayerDims(2, 2, 40), LayerDims(0, 0, 48), LayerDims(0, 0, 0))
    >>> hf_custom.problems(LlamaConfig(vocab=64, d=24, head_dim=8, layers=layers, shortcuts=True, norm_width=32))
    []
    """
    if dict(cfg.rope_scaling).get("rope_type") == "grid":
        return ["rope scaling 'grid' is unknown to transformers; only this library runs such a model"]
    beyond = beyond_llama(cfg)
    return [f"{', '.join(beyond)} of family {cfg.family}, which our code for transformers does not have"] if beyond else []


def write(folder: str | Path, params: Params, cfg: LlamaConfig, tokenizer: Any = None) -> None:
    """Writes the folder as `jaxprune.models.save` does.

    Args:
      folder, params, cfg, tokenizer: as in `save`.

    Raises:
      ValueError: `problems(cfg)` is not empty, or `params` is not a tree of `cfg`.
    """
    hf.refuse("hf-custom", problems(cfg))
    checkpoint.save(folder, params, cfg, tokenizer)


def predicted_bytes(cfg: LlamaConfig, dtype: Any) -> int:
    """Bytes of the tensors in the file; arguments as in `hf.predicted_bytes`."""
    return hf.predicted_bytes(cfg, dtype)
