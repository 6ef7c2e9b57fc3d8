"""The flags of distillation, and what they make: a teacher that fits the student, and a loss."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np

from jaxprune import models, recovery
from jaxprune.commands import _devices
from jaxprune.commands._common import flag
from jaxprune.models import checkpoint
from jaxprune.models.mamba_config import only_llama


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
    """Learn from the dense model instead of the text's next tokens."""

    distill: Annotated[str | None, flag("TEACHER", "none")] = None
    """The model that the pruned one was cut from, named as MODEL is. It stays as it is."""
    distill_loss: Annotated[
        Literal["forward", "reverse", "blockwise"] | None, flag("{forward,reverse,blockwise}", "forward")
    ] = None
    """forward, reverse: divergence of the next-token distributions, in the mean over the teacher's or the student's.
    blockwise: each layer alone learns to do what the teacher's does with the teacher's input."""
    temperature: Annotated[float | None, flag("T", "1")] = None
    """Soften both distributions: logits are divided by T, the loss is multiplied by its square."""
    top_k: Annotated[int | None, flag("N", "all")] = None
    """Tell only the teacher's N most likely tokens apart; all others together count as one more."""
    ce_weight: Annotated[float | None, flag("W", "0")] = None
    """Add W times the cross-entropy of the text's next token."""
    hidden_weight: Annotated[float | None, flag("W", "0")] = None
    """Add W times the normalised mean square between the residual streams after each layer."""
    layer_map: Annotated[str | None, flag("S:T,...", "layers of equal number")] = None
    """The teacher's layer that each of the student's layers is compared with."""


class Teacher(NamedTuple):
    """A teacher in memory.

    Attributes:
      params, cfg: the model.
      sha256: of its weights.
    """

    params: models.Params
    cfg: models.LlamaConfig
    sha256: str


def check(flags: Distillation, model: str) -> None:
    """Refuses flags that mean nothing together, and a teacher that is not there or has other tokens than the student.

    Raises:
      ValueError, FileNotFoundError: what is wrong, before any weight is read.
    """
    given = [name for name, value in dataclasses.asdict(flags).items() if value is not None and name != "distill"]
    if flags.distill is None:
        for name in given:
            raise ValueError(f"{name}: {getattr(flags, name)} given without --distill TEACHER; name the model to learn from")
        return
    for name in given:
        if flags.distill_loss == "blockwise" and name not in ("distill_loss", "layer_map"):
            raise ValueError(
                f"{name}: {getattr(flags, name)} given; blockwise distillation compares neither logits nor the text"
            )
    student, teacher = checkpoint.resolve(model), checkpoint.resolve(flags.distill)
    small, dense = (only_llama(checkpoint.read_config(path), "distill") for path in (student, teacher))
    make_loss(flags, small, dense, None)
    vocabularies = [_vocabulary(path) for path in (student, teacher)]
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"distill: {flags.distill} has another tokenizer than {model}, so equal tokens mean different text; give the model "
            "that it was pruned from"
        )


def make_loss(
    flags: Distillation, cfg: models.LlamaConfig, teacher_cfg: models.LlamaConfig, alpha: int | None, sparse: bool = False
) -> recovery.AdapterLoss:
    """The loss that the flags ask for.

    Raises:
      ValueError: a flag is out of range, or the models do not fit together.
    """
    layer_map = _pairs(flags.layer_map)
    if flags.distill_loss == "blockwise":
        return recovery.block_loss(cfg, teacher_cfg, alpha=alpha, sparse=sparse, layer_map=layer_map)
    return recovery.distill_loss(
        cfg,
        teacher_cfg,
        alpha=alpha,
        sparse=sparse,
        reverse=flags.distill_loss == "reverse",
        temperature=1.0 if flags.temperature is None else flags.temperature,
        top_k=flags.top_k,
        ce_weight=flags.ce_weight or 0.0,
        hidden_weight=flags.hidden_weight or 0.0,
        layer_map=layer_map,
    )


def load(flags: Distillation, dtype: str | None, devices: _devices.Devices) -> Teacher | None:
    """The teacher of the flags on the student's devices, or None without one."""
    if flags.distill is None:
        return None
    found = _devices.load(devices, flags.distill, dtype, needs_tokenizer=False)
    return Teacher(found.params, found.cfg, _fingerprint(found.params))


def settings(flags: Distillation, teacher: Teacher | None) -> dict[str, Any]:
    """What a resumed run has to repeat, as JSON values: the flags that were given, and the teacher by its weights."""
    if teacher is None:
        return {}
    given = {name: value for name, value in dataclasses.asdict(flags).items() if value is not None and name != "distill"}
    return dict(distillation=given | dict(teacher=teacher.sha256))


def _fingerprint(params: models.Params) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}".encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return digest.hexdigest()


def _vocabulary(path: Path) -> dict[str, int] | None:
    try:
        return models.load_tokenizer(path).get_vocab()
    except FileNotFoundError:
        return None


def _pairs(text: str | None) -> tuple[tuple[int, int], ...] | None:
    if text is None:
        return None
    pairs = [pair.split(":") for pair in text.split(",")]
    if not all(len(pair) == 2 and all(number.strip().isdecimal() for number in pair) for pair in pairs):
        raise ValueError(f"layer_map: {text!r} given; give pairs STUDENT:TEACHER of layers from 0, such as 0:0,1:2,2:5")
    return tuple((int(s), int(t)) for s, t in pairs)
