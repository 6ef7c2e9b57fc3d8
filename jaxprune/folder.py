"""A model and what is known of it: loaded from anywhere, saved as one folder with its record, `jaxprune.json`."""

import importlib.metadata
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxprune import _hosts, sharding, surgery
from jaxprune._decode import check_file
from jaxprune._json import write_json
from jaxprune.models import Config, Params
from jaxprune.models import checkpoint as checkpoints
from jaxprune.models import tokenizer as tokenizers
from jaxprune.models._safetensors import read_json
from jaxprune.models.mamba_config import only_llama
from jaxprune.plan import Plan

RECORD = "jaxprune.json"
DTYPES = ("float32", "bfloat16")
KEYS: dict[str, Any] = dict(  # of a record, and their types
    plan=dict, method=dict, source=str, calibration=dict | None, seed=int, versions=dict, metrics=dict, updates=list,
    before=dict | None,
)  # fmt: skip


class Model(NamedTuple):
    """A model in memory.

    Attributes:
      params, cfg: the model; of `load` a `LlamaConfig`, of `load_any` a `Config`.
      tokenizer: of transformers, or None.
      source: what the user named.
      record: the content of its `jaxprune.json`, or None.
    """

    params: Params
    cfg: Any
    tokenizer: Any
    source: str
    record: dict[str, Any] | None


def load(source: str, dtype: str | None = None, **options: Any) -> Model:
    """Loads a LLaMA-family model; arguments and errors as of `load_any`, and others are refused before anything is read.

    Raises:
      ValueError: it is of another family.
    """
    return load_any(source, dtype, admit=only_llama, **options)


def load_any(
    source: str,
    dtype: str | None = None,
    *,
    needs_tokenizer: bool = True,
    mesh: Mesh | None = None,
    strict: bool = False,
    admit: Callable[[Config, str], Config] | None = None,
) -> Model:
    """Loads a model of any architecture, its tokenizer and its record.

    Args:
      source: a folder, a `.gguf` file, `smollm2`, or a name on the Hugging Face hub.
      dtype: `float32`, `bfloat16`, or None for what the file holds.
      needs_tokenizer: refuse a folder without a tokenizer, such as that of a model of image tokens.
      mesh: devices that the parameters are spread over, see `jaxprune.sharding`, or None for one.
      strict: refuse a mesh by which the model does not divide.
      admit: called with the configuration and the source before anything else is read; refuses what the caller cannot use.

    Raises:
      FileNotFoundError, ValueError: there is no such model, or it is damaged or not supported.
    """
    path = checkpoints.resolve(source)
    found = checkpoints.opened(path)
    cfg = found.cfg if admit is None else admit(found.cfg, str(source))
    place = None if mesh is None else sharding.place(cfg, mesh, strict=strict)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} given; allowed are {', '.join(DTYPES)}")
    record = read_record(path)
    params = checkpoints.read(found, None if dtype is None else jnp.dtype(dtype), place)
    return Model(params, cfg, load_tokenizer(path, needs_tokenizer), str(source), record)


def load_tokenizer(path: Path, needed: bool) -> Any:
    """The tokenizer of a folder or file; None where it has none and none is needed."""
    try:
        return tokenizers.load_tokenizer(path)
    except FileNotFoundError:
        if needed:
            raise
        return None


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a folder that jaxprune wrote, or None.

    Raises:
      ValueError: the record cannot be read.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    record = read_json(path)
    _check_record(path, record)
    return record


def _check_record(path: Path, record: dict[str, Any]) -> None:
    wrong = [key for key, kind in KEYS.items() if not isinstance(record.get(key), kind)]
    if not wrong and not all(isinstance(u, dict) and {"by", "arrays"} <= u.keys() for u in record["updates"]):
        wrong = ["updates"]
    if wrong:
        raise ValueError(f"{path}: not a record of jaxprune: {wrong[0]!r} is missing or malformed; prune the model again")
    try:
        Plan.from_dict(record["plan"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if record.get("before"):
        _check_record(path, record["before"])


def save(folder: Path, model: Model) -> None:
    """Writes the model, its tokenizer and its record into a folder; see `_files.atomic_folder` for doing so atomically."""
    with _hosts.alike():
        checkpoints.save(folder, model.params, model.cfg, model.tokenizer)
        if model.record is not None and _hosts.first():
            write_json(folder / RECORD, model.record)


def plan_from(record: dict[str, Any], cfg: Config, small_cfg: Config) -> Plan:
    """The plan that leads from the model `cfg` to the recorded one, `small_cfg`, through earlier prunings if need be.

    Where no part of the recorded chain does that, all of it is returned, and `proof.verify` says what does not fit.
    """
    plan = Plan.from_dict(record["plan"])
    while not _leads(plan, cfg, small_cfg) and record.get("before"):
        record = record["before"]
        plan = Plan.from_dict(record["plan"]).then(plan)
    return plan


def _leads(plan: Plan, cfg: Config, small_cfg: Config) -> bool:
    try:
        made = surgery.pruned_config(cfg, plan)
    except ValueError:
        return False
    return (made.layers, made.d) == (small_cfg.layers, small_cfg.d)


def read_plan(path: Path) -> Plan:
    """The plan in a file of its own or in a record.

    Raises:
      OSError, ValueError: there is no such file, or it holds no plan.
    """
    content = read_json(check_file(path, "a plan or a jaxprune.json"))
    return Plan.from_dict(content.get("plan", content))


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
