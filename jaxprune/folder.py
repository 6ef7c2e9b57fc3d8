"""A model and what is known of it: loaded from anywhere, saved as one folder with its record, `jaxprune.json`."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune._json import write_json
from jaxprune.models import LlamaConfig, Params
from jaxprune.models import checkpoint as checkpoints
from jaxprune.models import tokenizer as tokenizers
from jaxprune.plan import Plan

RECORD = "jaxprune.json"
DTYPES = ("float32", "bfloat16")


class Model(NamedTuple):
    """A model in memory.

    Attributes:
      params, cfg: the model.
      tokenizer: of transformers.
      source: what the user named.
      record: the content of its `jaxprune.json`, or None.
    """

    params: Params
    cfg: LlamaConfig
    tokenizer: Any
    source: str
    record: dict[str, Any] | None


def load(source: str, dtype: str | None = None) -> Model:
    """Loads a model, its tokenizer and its record.

    Args:
      source: a folder, a `.gguf` file, `smollm2`, or a name on the Hugging Face hub.
      dtype: `float32`, `bfloat16`, or None for what the file holds.

    Raises:
      FileNotFoundError, ValueError: there is no such model, or it is damaged or not supported.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} given; allowed are {', '.join(DTYPES)}")
    path = checkpoints.resolve(source)
    record = read_record(path)
    params, cfg = checkpoints.load(path, dtype=None if dtype is None else jnp.dtype(dtype))
    return Model(params, cfg, tokenizers.load_tokenizer(path), str(source), record)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a folder that jaxprune wrote, or None.

    Raises:
      ValueError: the record cannot be read.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: damaged ({e}); prune the model again") from None
    if not isinstance(record, dict) or "plan" not in record:
        raise ValueError(f"{path}: not a record of jaxprune (no key `plan`); prune the model again")
    return record


def save(folder: Path, model: Model) -> None:
    """Writes the model, its tokenizer and its record into a folder; see `_files.atomic_folder` for doing so atomically."""
    checkpoints.save(folder, model.params, model.cfg, model.tokenizer)
    if model.record is not None:
        write_json(folder / RECORD, model.record)


def plan_from(record: dict[str, Any], cfg: LlamaConfig) -> Plan:
    """The plan that leads from the model `cfg` to the recorded one, through earlier prunings if need be.

    Raises:
      ValueError: none of the recorded prunings began with such a model.
    """
    plan = Plan.from_dict(record["plan"])
    while True:
        try:
            plan.check(cfg)
            return plan
        except ValueError:
            record = record.get("before") or {}
            if "plan" not in record:
                raise
            plan = Plan.from_dict(record["plan"]).then(plan)


def updates_of(record: dict[str, Any]) -> tuple[str, ...]:
    """Names of the arrays that were meant to change after the cut."""
    mine = [name for update in record.get("updates", ()) for name in update["arrays"]]
    before = record.get("before")
    return tuple(dict.fromkeys(mine + list(updates_of(before) if before else ())))


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ("jaxprune", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    return found | {"python": platform.python_version(), "device": jax.devices()[0].device_kind}
