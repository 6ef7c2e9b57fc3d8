"""Hugging Face folders: tensor names, and reading and writing them as safetensors."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxprune.models import _hf, _hf_chatglm, _hf_mamba, axes
from jaxprune.models._layout import ROTATED, WHOLE, Rows, Source, file_shape, halves
from jaxprune.models._stored import Stored
from jaxprune.models.mamba_config import MambaConfig
from jaxprune.models.types import Config

NAMES = dict(
    embed="model.embed_tokens.weight",
    norm="model.norm.weight",
    head="lm_head.weight",
    attn_norm="input_layernorm.weight",
    mlp_norm="post_attention_layernorm.weight",
    **{n: f"self_attn.{n}_proj.weight" for n in "qkvo"},
    **{n: f"self_attn.{n}.weight" for n in axes.QK_NORMS},
    **{n: f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")},
    **{f"{n}_bias": f"self_attn.{n}_proj.bias" for n in "qkvo"},
    **{f"{n}_bias": f"mlp.{n}_proj.bias" for n in ("gate", "up", "down")},
    **{n: f"{n}.weight" for n in axes.SHORTCUTS | axes.POST_NORMS},
)
DTYPES = {n: np.dtype(t) for n, t in dict(F32=np.float32, F16=np.float16, BF16=ml_dtypes.bfloat16).items()}
PART = 1 << 22  # numbers that are read at a time
SHARD = 1 << 30  # bytes of tensors in one file


def tensor_names(config: dict[str, Any]) -> Callable[[str, int | None], str]:
    """(array name, layer of the model) -> tensor name in a file with this `config.json`.

    An array that shares its tensor with others has the name of that tensor, and its own in brackets.
    """
    if _hf_mamba.is_mamba(config):
        return _hf_mamba.tensor_name()
    numbers, table = _hf.numbering(config), _hf.table_of(config)
    own = NAMES | table.names
    own |= {name: f"{fused}[{name}]" for fused, names in table.fused.items() for name in names}

    def name(array: str, layer: int | None) -> str:
        return own[array] if layer is None else f"{table.layers}.{numbers[layer]}.{own.get(array, array)}"

    return name


class _Place(NamedTuple):
    """Rows of a tensor in a file, and where they belong in the array that they are, or None for as they come."""

    file: Path
    tensor: str
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype
    order: np.ndarray | None = None


def open_folder(folder: Path) -> Source:
    """A folder with `config.json` and `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Raises:
      FileNotFoundError: `config.json`, the weights or a shard are missing.
      ValueError: a file that cannot be read, an architecture that is not supported, quantised tensors.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json; a checkpoint folder holds config.json and model.safetensors")
    config = _hf_chatglm.with_glm_keys(read_json(folder / "config.json"))
    cfg = _hf.from_hf_config(config)
    found: dict[str, _Place] = {}
    for file in _files(folder):
        with _opened(file) as f:
            for name in f.keys():  # noqa: SIM118 (not a dict)
                tensor = f.get_slice(name)
                if tensor.get_dtype() not in DTYPES:
                    raise ValueError(
                        f"{file}: tensor {name} is stored as {tensor.get_dtype()}; supported are {', '.join(DTYPES)}"
                    )
                found[name] = _Place(file, name, 0, tuple(tensor.get_shape()), DTYPES[tensor.get_dtype()])
    if not found:
        raise ValueError(f"{folder}: the checkpoint holds no tensors")
    _take_apart(found, cfg, config, str(folder))

    def read(name: str, rows: slice = WHOLE, columns: slice = WHOLE) -> Iterator[tuple[Rows, np.ndarray]]:
        place = found[name]
        first, last, _ = rows.indices(place.shape[0])
        across = (slice(*columns.indices(place.shape[1])),) if len(place.shape) > 1 else ()
        step = max(1, PART // max(1, math.prod(s.stop - s.start for s in across)))
        with _opened(place.file) as f:
            tensor = f.get_slice(place.tensor)
            for start in range(first, last, step):
                part = slice(start, min(start + step, last))
                values = tensor[(slice(place.start + part.start, place.start + part.stop), *across)]
                yield part if place.order is None else place.order[part], values

    absent = tuple(NAMES[f"{n}_bias"] for n in set(_hf.stored_biases(config)) - set(cfg.biases))
    for name in found:
        if absent and name.endswith(absent) and any(values.any() for _, values in read(name)):
            raise ValueError(
                f"{folder}: tensor {name} is not zero, but {_hf.BIASES_KEY} in config.json leaves it out; remove that key"
            )
    name_of = tensor_names(config)
    tied = (name_of("head", None),) if cfg.tie_embeddings else ()
    return Source(
        where=str(folder),
        cfg=cfg,
        dtype=np.result_type(*{place.dtype for place in found.values()}),
        shapes={name: place.shape for name, place in found.items()},
        name=name_of,
        read=read,
        spare=lambda name: name.endswith(("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", *absent, *tied)),
    )


def _take_apart(found: dict[str, _Place], cfg: Config, config: dict[str, Any], where: str) -> None:
    """Replaces each tensor that holds several arrays by its parts, and says where rows belong that are in another order."""
    if isinstance(cfg, MambaConfig):
        return
    name, table = tensor_names(config), _hf.table_of(config)
    for layer in _hf.numbering(config):
        size, letters = cfg.sizes(cfg.layers[layer]), cfg.layer_arrays(cfg.layers[layer])
        for fused, arrays in table.fused.items():
            whole = found.get(stored := name(fused, layer))
            if whole is None or arrays[0] not in letters:
                continue
            shapes = [file_shape(n, tuple(size[a] for a in letters[n])) for n in arrays]
            wanted = (sum(shape[0] for shape in shapes), *shapes[0][1:])
            if whole.shape != wanted:
                raise ValueError(f"{where}: tensor {stored} has shape {whole.shape}; its configuration says {wanted}")
            del found[stored]
            start = 0
            for n, shape in zip(arrays, shapes, strict=True):
                found[name(n, layer)] = whole._replace(start=start, shape=shape)
                start += shape[0]
        for n in ROTATED if table.interleaved else ():
            if place := found.get(name(n, layer)):
                found[name(n, layer)] = place._replace(order=halves(place.shape[0], cfg.head_dim, cfg.rotary_dim))


def write(
    folder: Path | None, tensors: list[Stored], name: Callable[[str, int | None], str], *, together: bool, shard: int = SHARD
) -> None:
    """Writes `model.safetensors`, or shards of at most `shard` bytes and their index; one shard at a time is copied.

    Args:
      folder: to write into; None computes all values, for which another process may wait, and writes nothing.
      tensors: in order.
      name: of a tensor.
      together: other processes compute the values, too, so all are computed before an error is raised.
      shard: bytes in a file.

    Raises:
      OSError: a file cannot be written.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    named = {name(tensor.name, tensor.layer): tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        named,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard,
    )
    failed: OSError | None = None
    for file, keys in split.filename_to_tensors.items():
        arrays = {}
        for key in keys:
            values = named[key].values()
            if folder is not None and failed is None:
                arrays[key] = np.ascontiguousarray(values)
        try:
            if folder is not None and arrays:
                _save(folder, file, arrays)
        except OSError as error:
            failed = error
        if failed is not None and not together:
            break
    if failed is not None:
        raise failed
    if folder is not None and split.is_sharded:
        index = dict(metadata=split.metadata, weight_map=split.tensor_to_filename)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save(folder: Path, file: str, arrays: dict[str, np.ndarray]) -> None:
    try:
        save_file(arrays, folder / file, metadata=dict(format="pt"))
    except SafetensorError as e:
        raise OSError(f"{folder / file}: cannot be written ({e})") from None
    (folder / file).chmod(folder.stat().st_mode & 0o666)  # safetensors lets only the owner read it


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ValueError(f"{index}: no weight_map; the file is damaged")
        files = [folder / name for name in sorted(set(places.values()))]
        if missing := [f.name for f in files if not f.is_file()]:
            raise FileNotFoundError(f"{folder}: shard {missing[0]} is missing ({len(missing)} of {len(files)} are)")
        return files
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        raise ValueError(
            f"{folder}: only pickled weights (.bin, .pth); convert them to safetensors first (save_pretrained writes it)"
        )
    raise FileNotFoundError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "np")
    except SafetensorError as e:
        raise ValueError(f"{file}: not a complete safetensors file ({e}); copy or download it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ValueError(f"{path}: not valid JSON ({e}); the file is damaged") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON {type(value).__name__} given; it must be an object")
    return value
