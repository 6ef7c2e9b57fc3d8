"""Layers of two kinds in `config.json`: `layer_types`, and rotary settings by kind, as transformers 5 writes them."""

from typing import Any

from jaxprune.models._hf_layers import positive
from jaxprune.models.config import LlamaConfig

FULL, SLIDING = TYPES = ("full_attention", "sliding_attention")
TYPES_KEY, GONE_TYPES_KEY = "layer_types", "jaxprune_gone_layer_types"
PATTERN_KEY = "sliding_window_pattern"  # without `layer_types`, every so-many-th layer sees all tokens


def windowed_from_hf(config: dict[str, Any], n: int, gone: list[int]) -> tuple[bool, ...]:
    """Which layers see the window alone; empty if the file has one kind.

    Args:
      config: the file, its family's defaults in it.
      n: its layers.
      gone: positions of layers that it leaves out, ascending.

    Raises:
      ValueError: types that are not two of `TYPES`, or not as many as layers.
    """
    types, pattern = config.get(TYPES_KEY), config.get(PATTERN_KEY)
    if types is None and pattern is None:
        return ()
    if types is None:
        types = [SLIDING if (i + 1) % positive(config, PATTERN_KEY) else FULL for i in range(n)]
    out = _checked(types, TYPES_KEY, n)
    for position, held in zip(gone, _checked(config.get(GONE_TYPES_KEY) or [], GONE_TYPES_KEY, len(gone)), strict=True):
        out.insert(position, held)
    return tuple(out)


def _checked(types: Any, key: str, n: int) -> list[bool]:
    if not isinstance(types, list) or set(types) - set(TYPES) or len(types) != n:
        raise ValueError(f"config.json: {key} {types!r} given; it must be a list of {n}, each {' or '.join(TYPES)}")
    return [t == SLIDING for t in types]


def windowed_to_hf(cfg: LlamaConfig, gone: list[int]) -> dict[str, Any]:
    """The keys for a file that leaves out the layers at the positions `gone`."""
    if not cfg.windowed:
        return {}
    types = [TYPES[held] for held in cfg.windowed]
    stay = [t for i, t in enumerate(types) if i not in gone]
    return {TYPES_KEY: stay} | ({GONE_TYPES_KEY: [types[i] for i in gone]} if gone else {})


def rope_by_kind(config: dict[str, Any], key: str) -> dict[str, Any]:
    """The same file with the rotary settings of layers that see all tokens, and with the base of the others under `key`.

    Raises:
      ValueError: layers with a window whose rotary frequencies are scaled, or rotate in part.
    """
    given = config.get("rope_parameters")
    if not isinstance(given, dict) or not set(given) & set(TYPES):
        return config
    full, local = (given.get(kind) or {} for kind in TYPES)
    if local.get("rope_type", "default") != "default" or (extra := set(local) - {"rope_type", "rope_theta"}):
        what = local["rope_type"] if local.get("rope_type", "default") != "default" else sorted(extra)[0]
        raise ValueError(f"config.json: rope_parameters of {SLIDING} have {what!r}; supported is a rope_theta of their own")
    full = dict(rope_theta=config.get("rope_theta")) | full | (config.get("rope_scaling") or {})
    return config | {"rope_parameters": full, "rope_scaling": None, key: local.get("rope_theta", config.get(key))}


def kinds_of_rope(cfg: LlamaConfig, rope: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` for transformers: `rope`, or that of layers that see all tokens beside that of the others."""
    if cfg.local_rope_theta is None:
        return rope
    return {FULL: rope, SLIDING: dict(rope_type="default", rope_theta=cfg.local_rope_theta)}
