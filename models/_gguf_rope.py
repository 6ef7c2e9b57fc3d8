"""Rotary scalings in GGUF metadata, as the settings of Hugging Face."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune.models import _rope
from jaxprune.models.config import LlamaConfig

LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def scaling(
    path: Path, get: Callable[[str], Any], factors: dict[str, np.ndarray], cfg: LlamaConfig
) -> tuple[tuple[str, Any], ...]:
    """The `rope_scaling` of a `LlamaConfig`.

    llama.cpp stores the llama3 scaling only as the divisors that it results in (`rope_freqs.weight`). They become llama3 again
    if the published constants give them, and otherwise `longrope`, which takes any divisors.

    Args:
      path: for messages.
      get: key below `rope.` -> value of the metadata or None.
      factors: the tensors with divisors of the frequencies, float32[h/2], by name.
      cfg: the model without its scaling.
    """
    for name, values in factors.items():
        if len(values) != cfg.head_dim // 2:
            raise ValueError(f"{path}: tensor {name} has {len(values)} numbers; it needs {cfg.head_dim // 2}")
    if "rope_freqs.weight" in factors:
        divisors = factors["rope_freqs.weight"].astype(np.float64)
        settings = LLAMA3 | dict(rope_type="llama3", factor=float(divisors.max()))
        candidate = _rope.frequencies(_scaled(cfg, settings), 1)[0]
        plain = _rope.frequencies(cfg, 1)[0]
        if np.allclose(plain / candidate, divisors, rtol=1e-4, atol=0):
            return _pairs(settings)
        return _long(divisors, divisors, 1.0, cfg.max_positions)
    original = get("scaling.original_context_length") or cfg.max_positions
    if "rope_factors_long.weight" in factors:
        long = factors["rope_factors_long.weight"]
        short = factors.get("rope_factors_short.weight", np.ones_like(long))
        return _long(short, long, get("scaling.attn_factor") or 1.0, original)
    kind = get("scaling.type") or ("linear" if get("scale_linear") else "none")
    factor = get("scaling.factor") or get("scale_linear") or 1.0
    if kind == "none" or factor == 1.0:
        return ()
    if kind == "linear":
        return _pairs(dict(rope_type="linear", factor=factor))
    if kind == "yarn":
        return _pairs(dict(rope_type="yarn", factor=factor, original_max_position_embeddings=original))
    raise ValueError(f"{path}: rope scaling {kind!r} is not supported; supported are none, linear, yarn, longrope")


def _scaled(cfg: LlamaConfig, settings: dict[str, Any]) -> LlamaConfig:
    return dataclasses.replace(cfg, rope_scaling=_pairs(settings))


def _long(short: np.ndarray, long: np.ndarray, attention: float, original: int) -> tuple[tuple[str, Any], ...]:
    return _pairs(
        dict(
            rope_type="longrope",
            short_factor=tuple(map(float, short)),
            long_factor=tuple(map(float, long)),
            attention_factor=attention,
            original_max_position_embeddings=original,
        )
    )


def _pairs(settings: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(settings.items()))
