"""The parameters of `FlaxLlamaForCausalLM` (transformers 4), both ways.

The tree, with one entry per layer below `layers` and kernels as [in, out]::

    {"model": {"embed_tokens": {"embedding"},
               "layers": {"0": {"input_layernorm": {"weight"},
                                "self_attn": {"q_proj": {"kernel"}, "k_proj": ..., "v_proj": ..., "o_proj": ...},
                                "post_attention_layernorm": {"weight"},
                                "mlp": {"gate_proj": {"kernel"}, "up_proj": ..., "down_proj": ...}}},
               "norm": {"weight"}},
     "lm_head": {"kernel"}}

With biases, a projection has `bias` beside `kernel`. The rotary embedding has no parameters.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.models import _hf, _safetensors, _stored, axes
from jaxprune.models._families import LIKE_LLAMA, OURS
from jaxprune.models._layout import Rows, Source, assemble
from jaxprune.models.config import LlamaConfig
from jaxprune.models.mamba_config import only_llama
from jaxprune.models.types import Params

FILE = "flax_model.msgpack"


def from_flax(tree: Any, cfg: LlamaConfig) -> Params:
    """Our parameters from a Flax LLaMA tree, bit for bit.

    Args:
      tree: nested dict or `FrozenDict` as above, also as `{"params": tree}`, without the layers that `to_hf_config(cfg)` leaves
        out. With `cfg.tie_embeddings`, `lm_head` may be absent, or is the transposed embedding.
      cfg: the model, e.g. `from_hf_config` of its `config.json`.

    Raises:
      ValueError: an array that is missing, has another shape, has no place in the model, or is not finite; or a family that
        transformers 4 did not have in Flax.
    """
    from flax import traverse_util
    from flax.core import unfreeze

    flat = {"/".join(path): np.asarray(x) for path, x in traverse_util.flatten_dict(unfreeze(tree)).items()}
    if flat and all(name.startswith("params/") for name in flat):
        flat = {name.removeprefix("params/"): x for name, x in flat.items()}
    config = _config(cfg)
    stored = {name: x if name.endswith("embedding") else x.T for name, x in flat.items()}
    padding = {f"{n}_proj/bias" for n in set(_hf.stored_biases(config)) - set(cfg.biases)}
    zeros = {name for name in stored if name.split("/", 4)[-1] in padding}
    for name in zeros:
        if stored[name].any():
            raise ValueError(f"Flax tree: {name} is not zero, but the configuration has no such bias; add it to `biases`")
    if cfg.tie_embeddings and "lm_head/kernel" in stored:
        embedding = stored.get("model/embed_tokens/embedding", np.empty(0))
        if not np.array_equal(stored["lm_head/kernel"], embedding):
            raise ValueError("Flax tree: lm_head differs from the embedding; set tie_embeddings=False in the configuration")
        zeros.add("lm_head/kernel")

    def read(name: str, rows: slice, columns: slice) -> Iterator[tuple[Rows, np.ndarray]]:
        yield rows, stored[name][(rows, columns)[: stored[name].ndim]]

    source = Source(
        where="Flax tree",
        cfg=cfg,
        dtype=np.dtype(jnp.result_type(*{x.dtype for x in stored.values()})) if stored else np.dtype(np.float32),
        shapes={name: x.shape for name, x in stored.items()},
        name=_names(config),
        read=read,
        spare=lambda name: name in zeros,
    )
    return assemble(source, None, lambda _, x: jax.device_put(np.asarray(x)))


def to_flax(params: Params, cfg: LlamaConfig) -> dict[str, Any]:
    """The Flax LLaMA tree of our parameters, bit for bit, for a model with the configuration `to_hf_config(cfg)`.

    Args:
      params: the tree of `init`, pruned or not.
      cfg: what `params` was made with. With tied embeddings, `lm_head` is the transposed embedding.

    Returns:
      Nested dicts of numpy arrays.

    Raises:
      ValueError: a family that transformers 4 did not have in Flax.
    """
    from flax import traverse_util

    config = _config(cfg)
    name = _names(config)
    flat = {}
    for tensor in _stored.tensors(params, cfg, config):
        values = tensor.values()
        flat[name(tensor.name, tensor.layer)] = values if tensor.name == "embed" else values.T
    if cfg.tie_embeddings:
        flat["lm_head/kernel"] = flat["model/embed_tokens/embedding"].T
    return traverse_util.unflatten_dict(flat, sep="/")


def load_flax_msgpack(folder: str | Path) -> tuple[Params, LlamaConfig]:
    """Reads `config.json` and `flax_model.msgpack` (or its shards) of a folder that transformers 4 wrote.

    Raises:
      FileNotFoundError: one of the two is missing.
      ValueError: they are damaged, or as `from_hf_config` and `from_flax`.
    """
    from flax import serialization, traverse_util

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json")
    index = folder / f"{FILE}.index.json"
    files = sorted(set(_safetensors.read_json(index)["weight_map"].values())) if index.is_file() else [FILE]
    flat: dict[str, Any] = {}
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder}: no {file}")
        try:
            flat |= traverse_util.flatten_dict(serialization.msgpack_restore((folder / file).read_bytes()), sep="/")
        except (ValueError, AttributeError, AssertionError) as e:
            raise ValueError(f"{folder / file}: not a complete msgpack file ({e}); copy or download it again") from None
    config = _safetensors.read_json(folder / "config.json")
    cfg = only_llama(_hf.from_hf_config(config), "Flax")
    return from_flax(traverse_util.unflatten_dict(flat, sep="/"), cfg), cfg


def save_flax_msgpack(folder: str | Path, params: Params, cfg: LlamaConfig) -> None:
    """Writes `config.json` and `flax_model.msgpack`, which `FlaxLlamaForCausalLM.from_pretrained` of transformers 4 reads."""
    from flax import serialization

    tree = jax.tree.map(np.ascontiguousarray, to_flax(params, cfg))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_hf.to_hf_config(cfg), indent=2) + "\n", encoding="utf-8")
    (folder / FILE).write_bytes(serialization.to_bytes(tree))


def _config(cfg: LlamaConfig) -> dict[str, Any]:
    config = _hf.to_hf_config(cfg)
    if config["model_type"] not in (*LIKE_LLAMA, OURS):
        raise ValueError(
            f"Flax tree: a model of family {config['model_type']} given, which FlaxLlamaForCausalLM cannot compute; "
            f"families of Flax trees are {', '.join(LIKE_LLAMA)}; use load and save"
        )
    return config


def _names(config: dict[str, Any]) -> Callable[[str, int | None], str]:
    dotted = _safetensors.tensor_names(config)

    def name(array: str, layer: int | None) -> str:
        path = dotted(array, layer).replace(".", "/")
        if array == "embed":
            return path.removesuffix("weight") + "embedding"
        return path.removesuffix("weight") + "kernel" if array in (*axes.MATRICES, *axes.SHORTCUTS, "head") else path

    return name
