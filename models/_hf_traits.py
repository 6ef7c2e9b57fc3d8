"""The settings in `config.json` in which families differ from LLaMA, the `TRAITS` of `_families`."""

from collections.abc import Callable
from typing import Any

from jaxprune.models._families import FAMILIES, LEGACY_ACTIVATION, OURS
from jaxprune.models._family import TRAITS, Family
from jaxprune.models._hf_kinds import windowed_from_hf, windowed_to_hf
from jaxprune.models._hf_layers import number, positive
from jaxprune.models.config import ACTIVATIONS, LlamaConfig

GONE_KEY = "jaxprune_gone_layers"
CHECKED: dict[str, Callable[[dict[str, Any], str], float]] = dict(
    embed_scale=number, local_rope_theta=number, score_width=positive, score_cap=number, logit_cap=number
)  # trait -> reads a number of `config.json`


def fixed(table: Family, d: int) -> dict[str, Any]:
    """The traits in which all models of a family, with residual streams of width `d`, differ from LLaMA."""
    return {trait: value(d) if callable(value) else value for trait, value in table.fixed.items()}


def traits_from_hf(config: dict[str, Any], family: str, d: int) -> dict[str, Any]:
    """All traits of a file, as settings of `LlamaConfig`.

    Raises:
      ValueError: an activation that is not the family's, or numbers or kinds of layers that are malformed.
    """
    table = FAMILIES[family]
    traits = TRAITS | fixed(table, d) | {t: config.get(table.key(t), TRAITS[t]) for t in table.free}
    traits |= {t: read(config, table.key(t)) for t, read in CHECKED.items() if t in table.free and traits[t] is not None}
    if "windowed" in table.free:
        gone = sorted(config.get(GONE_KEY) or [])
        traits["windowed"] = windowed_from_hf(config, positive(config, "num_hidden_layers"), gone)
    key = table.key("activation")
    given = config.get(key, traits["activation"])
    named = dict(swish="silu", **({"gelu": "gelu_pytorch_tanh"} if family in LEGACY_ACTIVATION else {})).get(given, given)
    allowed = ACTIVATIONS if family == OURS else (traits["activation"],)
    if named not in allowed:
        raise ValueError(f"config.json: {key} {given!r} is not supported; supported is {' or '.join(map(repr, allowed))}")
    return traits | dict(activation=named)


def traits_to_hf(cfg: LlamaConfig, family: str, gone: list[int]) -> dict[str, Any]:
    """The keys of `config.json` that set the traits that the family leaves open, and the activation.

    Args:
      cfg: the model.
      family: of the file.
      gone: positions of layers that the file leaves out.
    """
    table = FAMILIES[family]
    said = [t for t in table.free if family != OURS or t == "sliding_window" or getattr(cfg, t) != TRAITS[t]]
    written = {table.key(t): getattr(cfg, t) for t in dict.fromkeys([*said, "activation"])}
    return written | windowed_to_hf(cfg, gone)
