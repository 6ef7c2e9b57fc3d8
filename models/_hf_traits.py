"""The settings in `config.json` in which families differ from LLaMA, the `TRAITS` of `_families`."""

from typing import Any

from jaxprune.models._families import FAMILIES, LEGACY_ACTIVATION, OURS, TRAITS, Family
from jaxprune.models.config import ACTIVATIONS, LlamaConfig


def fixed(table: Family, d: int) -> dict[str, Any]:
    """The traits in which all models of a family, with residual streams of width `d`, differ from LLaMA."""
    return {trait: value(d) if callable(value) else value for trait, value in table.fixed.items()}


def traits_from_hf(config: dict[str, Any], family: str, d: int) -> dict[str, Any]:
    """All traits of a file, as settings of `LlamaConfig`.

    Raises:
      ValueError: an activation that is not the family's.
    """
    table = FAMILIES[family]
    traits = TRAITS | fixed(table, d) | {t: config.get(table.key(t), TRAITS[t]) for t in table.free}
    key = table.key("activation")
    given = config.get(key, traits["activation"])
    named = dict(swish="silu", **({"gelu": "gelu_pytorch_tanh"} if family in LEGACY_ACTIVATION else {})).get(given, given)
    allowed = ACTIVATIONS if family == OURS else (traits["activation"],)
    if named not in allowed:
        raise ValueError(f"config.json: {key} {given!r} is not supported; supported is {' or '.join(map(repr, allowed))}")
    return traits | dict(activation=named)


def traits_to_hf(cfg: LlamaConfig, family: str) -> dict[str, Any]:
    """The keys of `config.json` that set the traits that the family leaves open, and the activation."""
    table = FAMILIES[family]
    said = [
        trait for trait in table.free if family != OURS or trait == "sliding_window" or getattr(cfg, trait) != TRAITS[trait]
    ]
    return {table.key(trait): getattr(cfg, trait) for trait in dict.fromkeys([*said, "activation"])}
