"""Rotary settings in `config.json`: `rope_theta` with `rope_scaling` (transformers 4) or `rope_parameters` (5)."""

from typing import Any

from jaxprune.models import _rope
from jaxprune.models._hf_layers import number
from jaxprune.models.config import LlamaConfig

Pairs = tuple[tuple[str, Any], ...]
NEEDED = dict(
    default=(),
    linear=("factor",),
    dynamic=("factor",),
    yarn=("factor",),
    longrope=("short_factor", "long_factor"),
    llama3=("factor", "low_freq_factor", "high_freq_factor"),
    grid=("columns", "first"),
)
LEAST = dict(columns=1, first=0)  # of a grid
OWN_LENGTH = "original_max_position_embeddings"  # how long the sequences of the original training were
WITH_LENGTH = ("llama3", "yarn", "longrope")


def partial_from_hf(config: dict[str, Any]) -> float:
    """The fraction of a head that rotates: inside the rotary settings it goes before outside, as in transformers."""
    key = "partial_rotary_factor"
    given = [config.get("rope_scaling"), config.get("rope_parameters"), config]
    return number(dict.fromkeys([key], next((g[key] for g in given if isinstance(g, dict) and g.get(key)), 1.0)), key)


def rope_from_hf(config: dict[str, Any], rotary_dim: int) -> tuple[float, Pairs]:
    """The base and the scaling as sorted pairs, empty if there is none, of heads of which `rotary_dim` dimensions rotate.

    Raises:
      ValueError: a kind that is not supported, or settings that it lacks.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise ValueError(f"config.json: rope_scaling {given!r} given; it must be an object")
    settings = dict(given)
    if any(isinstance(value, dict) for value in settings.values()):
        raise ValueError("config.json: rope_parameters differ between kinds of layers, which is not supported")
    base = settings.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    theta = number(dict(rope_theta=base), "rope_theta")
    old = settings.pop("type", None)
    kind = settings.pop("rope_type", None) or old or "default"
    if kind not in _rope.SCALINGS:
        raise ValueError(f"config.json: rope scaling {kind!r} is not supported; supported are {', '.join(_rope.SCALINGS)}")
    settings.pop("partial_rotary_factor", None)
    if kind == "default":
        return theta, ()
    settings = {key: value for key, value in settings.items() if value is not None}
    if kind in WITH_LENGTH:  # outside the settings it goes before inside, as in transformers
        settings[OWN_LENGTH] = config.get(OWN_LENGTH) or settings.get(OWN_LENGTH) or config.get("max_position_embeddings")
    if missing := [key for key in NEEDED[kind] if key not in settings]:
        raise ValueError(f"config.json: rope scaling {kind!r} lacks {missing[0]}")
    for key in NEEDED[kind]:
        if kind == "grid":
            _whole(settings, key, LEAST[key])
        elif not key.endswith(("short_factor", "long_factor")):
            number(settings, key)
        elif len(settings[key]) != rotary_dim // 2:
            raise ValueError(
                f"config.json: {key} of the rope scaling has {len(settings[key])} numbers; it needs {rotary_dim // 2}"
            )
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    return theta, tuple(sorted((settings | dict(rope_type=kind)).items()))


def _whole(settings: dict[str, Any], key: str, least: int) -> None:
    value = settings[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"config.json: {key} of the rope scaling is {value!r}; it must be a whole number, {least} or more")


def rope_to_hf(cfg: LlamaConfig) -> tuple[float, dict[str, Any] | None, dict[str, Any]]:
    """`rope_theta`, `rope_scaling` and `rope_parameters`."""
    scaling = {key: list(value) if isinstance(value, tuple) else value for key, value in cfg.rope_scaling}
    partial = {} if cfg.partial_rotary == 1.0 else dict(partial_rotary_factor=cfg.partial_rotary)
    rope = dict(rope_theta=cfg.rope_theta, **(scaling or dict(rope_type="default")), **partial)
    return cfg.rope_theta, scaling or None, rope
