"""Which of the teacher's layers a student's layer is compared with."""

from collections.abc import Sequence
from typing import TypeAlias

from jaxprune import models

LayerMap: TypeAlias = Sequence[tuple[int, int]]
"""Pairs of a student's layer and the teacher's layer after which its residual stream should be the same."""


def same_layers(cfg: models.LlamaConfig, teacher_cfg: models.LlamaConfig) -> tuple[tuple[int, int], ...]:
    """Each layer that the student still has with the teacher's of the same number: a cut keeps the places of layers that went.

    Raises:
      ValueError: the numbers of layers differ.

    >>> from jaxprune.models import LayerDims, LlamaConfig
    >>> cfg = LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 48), LayerDims(0, 0, 0), LayerDims(2, 2, 48)))
    >>> same_layers(cfg, cfg)
    ((0, 0), (2, 2))
    """
    if len(cfg.layers) != len(teacher_cfg.layers):
        raise ValueError(
            f"layer_map: the student has {len(cfg.layers)} layers, the teacher {len(teacher_cfg.layers)}; "
            "say which belong together, such as 0:0,1:2,2:5"
        )
    return tuple((i, i) for i in _present(cfg))


def _present(cfg: models.LlamaConfig) -> list[int]:
    return [i for i, dims in enumerate(cfg.layers) if cfg.layer_arrays(dims)]


def checked_map(cfg: models.LlamaConfig, teacher_cfg: models.LlamaConfig, layer_map: LayerMap | None) -> LayerMap:
    """The map, or `same_layers` where there is none.

    Raises:
      ValueError: residual streams that cannot be compared, or layers that are not there.
    """
    streams = [(c.d, c.shortcuts) for c in (cfg, teacher_cfg)]
    if streams[0] != streams[1]:
        found = [f"{d} channels" + ", rotated" * rotated for d, rotated in streams]
        raise ValueError(
            f"teacher: its residual stream has {found[1]}, the student's {found[0]}, so hidden states cannot be compared; "
            "distil the logits alone"
        )
    if layer_map is None:
        return same_layers(cfg, teacher_cfg)
    for s, t in layer_map:
        if not (s in _present(cfg) and 0 <= t < len(teacher_cfg.layers)):
            raise ValueError(
                f"layer_map: {s}:{t} given; the student has layers {_present(cfg)}, the teacher 0 to "
                f"{len(teacher_cfg.layers) - 1}"
            )
    if not layer_map:
        raise ValueError("layer_map: no pair given; give at least one, such as 0:0")
    return tuple(layer_map)


def check_rising(cfg: models.LlamaConfig, pairs: LayerMap) -> None:
    """Raises ValueError unless each of the student's layers has a later layer of the teacher's than the one before it."""
    own, other = [s for s, _ in pairs], [t for _, t in pairs]
    if own != _present(cfg) or other != sorted(set(other)):
        raise ValueError(
            f"layer_map: {','.join(f'{s}:{t}' for s, t in pairs)} given; block by block, each of the student's layers "
            f"{_present(cfg)} needs one of the teacher's, in rising order"
        )
