"""Widths of layers in `config.json`: of the model, or of each layer in the `per_layer_config` of transformers 5."""

from typing import Any

from jaxprune.models.config import LayerDims

WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
SUBLAYERS = ("attention", "mlp")
PAIRS = "jaxprune_rotary_pairs"


def widths(dims: LayerDims) -> dict[str, int]:
    """The three widths that `config.json` has for a layer."""
    return dict(zip(WIDTHS, (dims.kv_heads * dims.q_per_kv, dims.kv_heads, dims.ff), strict=True))


def layer_to_hf(dims: LayerDims) -> dict[str, Any]:
    """An entry of `per_layer_config`."""
    skip = [name for name, alive in zip(SUBLAYERS, (dims.kv_heads, dims.ff), strict=True) if not alive]
    pairs = {} if dims.pairs is None else {PAIRS: list(dims.pairs)}
    return {key: width for key, width in widths(dims).items() if width} | pairs | (dict(skip=skip) if skip else {})


def layers_from_hf(config: dict[str, Any], n: int) -> list[LayerDims]:
    """The widths of all `n` layers of a file."""
    per_layer = config.get("per_layer_config") or {}
    if not isinstance(per_layer, dict) or not all(isinstance(layer, dict) for layer in per_layer.values()):
        raise ValueError("config.json: per_layer_config must be an object of objects, one for each layer that differs")
    if unknown := sorted(i for i in per_layer if not i.isdecimal() or int(i) >= n):
        raise ValueError(f"config.json: per_layer_config names layer {unknown[0]!r}; the layers are 0 to {n - 1}")
    by_number = {int(i): layer for i, layer in per_layer.items()}
    return [layer_from_hf(config, by_number.get(i, {}), i) for i in range(n)]


def layer_from_hf(config: dict[str, Any], layer: dict[str, Any], i: int) -> LayerDims:
    """The widths of layer `i`: those of the model, overridden by its entry in `per_layer_config`."""
    known = (*WIDTHS, PAIRS, "skip")
    if unknown := sorted(set(layer) - set(known)):
        raise ValueError(f"config.json: per_layer_config of layer {i} sets {unknown[0]!r}; supported are {known}")
    skip = set(layer.get("skip", []))
    if skip - set(SUBLAYERS):
        raise ValueError(f"config.json: per_layer_config of layer {i} skips {sorted(skip)}; supported are {SUBLAYERS}")
    config = config | layer
    ff = 0 if "mlp" in skip else positive(config, "intermediate_size")
    if "attention" in skip:
        return LayerDims(0, 0, ff)
    heads = positive(config, "num_attention_heads")
    kv_heads = positive(config, "num_key_value_heads") if config.get("num_key_value_heads") is not None else heads
    if heads % kv_heads:
        raise ValueError(
            f"config.json: layer {i} has {heads} heads for {kv_heads} key/value heads; the first must be a multiple"
        )
    return LayerDims(kv_heads, heads // kv_heads, ff, _pairs(layer, i))


def _pairs(layer: dict[str, Any], i: int) -> tuple[int, ...] | None:
    pairs = layer.get(PAIRS)
    if pairs is not None and (not isinstance(pairs, list) or any(type(pair) is not int for pair in pairs)):
        raise ValueError(f"config.json: {PAIRS} {pairs!r} of layer {i} given; it must be a list of whole numbers")
    return None if pairs is None else tuple(pairs)


def architecture(config: dict[str, Any]) -> str | None:
    """The class that a `config.json` names first, if it names one."""
    listed = config.get("architectures")
    return listed[0] if isinstance(listed, list) and listed else listed or None


def positive(config: dict[str, Any], key: str) -> int:
    """A positive whole number of `config.json`; raises ValueError otherwise."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        given = f"{value!r} given" if key in config else "missing"
        raise ValueError(f"config.json: {key} {given}; it must be a positive whole number")
    return value


def number(config: dict[str, Any], key: str, default: float | None = None) -> float:
    """A positive number of `config.json`; raises ValueError otherwise."""
    value = config.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"config.json: {key} {value!r} given; it must be a positive number")
    return float(value)
