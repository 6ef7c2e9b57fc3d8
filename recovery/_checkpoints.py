"""Checkpoints of a training run with Orbax: whole or absent, and tied to the settings that they were written with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

State = TypeVar("State")


def open_folder(folder: str | Path) -> ocp.CheckpointManager:
    """The manager of the checkpoints under `folder`, which keeps the last two; close it, or use it in a `with`.

    Orbax writes a checkpoint beside its place and renames it, so after a kill the last one is whole. Saving is synchronous:
    adapters take a fraction of a second, and the next step reuses the memory of the arrays.
    """
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(n=2),
        cleanup_tmp_directories=True,
        enable_async_checkpointing=False,
    )
    return ocp.CheckpointManager(Path(folder).absolute(), options=options)


def save(manager: ocp.CheckpointManager, step: int, state: Any, settings: Mapping[str, Any]) -> None:
    """Writes a checkpoint of `state` after `step` updates."""
    items = dict(state=ocp.args.StandardSave(state), settings=ocp.args.JsonSave(dict(settings)))
    manager.save(step, args=ocp.args.Composite(**items), force=True)


def restore(manager: ocp.CheckpointManager, like: State, settings: Mapping[str, Any], *, resume: bool) -> State:
    """The state of the last checkpoint, or `like` itself if there is none.

    Args:
      manager: from `open_folder`.
      like: a state whose shapes, dtypes and shardings the result has.
      settings: must equal those of the checkpoint.
      resume: whether there may be a checkpoint.

    Raises:
      ValueError: a checkpoint without `resume`, or one with other settings, which are named.
    """
    step = manager.latest_step()
    if step is None:
        return like
    if not resume:
        raise ValueError(f"{manager.directory} holds a checkpoint of step {step}; resume from it, or choose another folder")
    saved = manager.restore(step, args=ocp.args.Composite(settings=ocp.args.JsonRestore()))["settings"]
    differences = _differences(saved, json.loads(json.dumps(settings)))
    if differences:
        raise ValueError(
            f"{manager.directory} was written with other settings ({'; '.join(differences)}); "
            "repeat those to resume, or choose another folder"
        )
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(template)))["state"]


def _differences(saved: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(saved, dict) and isinstance(now, dict):
        return [
            text
            for key in saved | now
            for text in _differences(saved.get(key, "absent"), now.get(key, "absent"), f"{name}.{key}" if name else key)
        ]
    return [] if saved == now else [f"{name} was {saved}, now {now}"]
