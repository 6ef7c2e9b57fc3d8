"""`config.json` and tensor names of Mamba: what transformers has, and what a model of uneven layers is called."""

import math
from collections.abc import Callable
from typing import Any

from jaxprune.models._hf_layers import architecture, number, positive
from jaxprune.models.mamba_config import MambaConfig, MambaDims

ARCHITECTURE = "MambaForCausalLM"
OURS, OURS_ARCHITECTURE = "jaxprune_mamba", "JaxpruneMambaForCausalLM"  # what transformers has no class for
INNER_KEY = "jaxprune_inner_sizes"
DEFAULTS: dict[str, Any] = dict(  # of transformers, for keys that a config.json leaves out
    vocab_size=50280,
    hidden_size=768,
    state_size=16,
    num_hidden_layers=32,
    expand=2,
    conv_kernel=4,
    time_step_rank="auto",
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
TOP = dict(embed="backbone.embeddings.weight", norm="backbone.norm_f.weight", head="lm_head.weight")
NAMES = dict(
    mixer_norm="norm.weight",
    A_log="mixer.A_log",
    D="mixer.D",
    **{n: f"mixer.{n}.weight" for n in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")},
    **{f"{n}_bias": f"mixer.{n}.bias" for n in ("in_proj", "conv1d", "dt_proj", "out_proj")},
)


def is_mamba(config: dict[str, Any]) -> bool:
    """Is this the `config.json` of a Mamba-1?"""
    named = architecture(config)
    return named in (ARCHITECTURE, OURS_ARCHITECTURE) if named else config.get("model_type") in ("mamba", OURS)


def from_hf(config: dict[str, Any]) -> MambaConfig:
    """The Mamba that a `config.json` describes.

    `intermediate_size` takes precedence over `expand`, as in transformers; `jaxprune_inner_sizes` has the width of each layer.

    Raises:
      ValueError: a setting that is not supported, or a key that is malformed.
    """
    config = {**DEFAULTS, **config}
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"config.json: hidden_act {config['hidden_act']!r} is not supported; supported is 'silu'")
    if config.get("quantization_config"):
        raise ValueError("config.json: quantization_config is set; quantised Mamba checkpoints are not supported")
    d, n = positive(config, "hidden_size"), positive(config, "num_hidden_layers")
    if "intermediate_size" in config or INNER_KEY in config:
        inner = config[INNER_KEY] if INNER_KEY in config else [positive(config, "intermediate_size")] * n
    else:
        inner = [int(number(config, "expand") * d)] * n
    if not isinstance(inner, list) or len(inner) != n or any(type(width) is not int or width < 1 for width in inner):
        raise ValueError(f"config.json: {INNER_KEY} {inner!r} given; it must be {n} positive whole numbers, one for each layer")
    rank, eos = config["time_step_rank"], config["eos_token_id"]
    outer = ("in_proj", "out_proj") if config.get("use_bias", False) else ()
    return MambaConfig(
        vocab=positive(config, "vocab_size"),
        d=d,
        layers=tuple(map(MambaDims, inner)),
        dt_rank=math.ceil(d / 16) if rank == "auto" else positive(config, "time_step_rank"),
        state=positive(config, "state_size"),
        conv=positive(config, "conv_kernel"),
        norm_eps=number(config, "layer_norm_epsilon", 1e-5),
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
        biases=outer[:1] + (("conv1d",) if config.get("use_conv_bias", True) else ()) + outer[1:],
        residual_in_fp32=bool(config.get("residual_in_fp32", True)),
        bos_id=config["bos_token_id"],
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        pad_id=config["pad_token_id"],
    )


def to_hf(cfg: MambaConfig) -> dict[str, Any]:
    """The `config.json` of a Mamba: a plain one where all layers are equally wide.

    transformers makes all layers `intermediate_size` wide, whatever `expand` says. Uneven layers are a `jaxprune_mamba` with
    `jaxprune_inner_sizes`, which transformers refuses by its name.
    """
    inner = [dims.inner for dims in cfg.layers]
    plain = not problems(cfg)
    config: dict[str, Any] = dict(
        architectures=[ARCHITECTURE if plain else OURS_ARCHITECTURE],
        model_type="mamba" if plain else OURS,
        vocab_size=cfg.vocab,
        hidden_size=cfg.d,
        num_hidden_layers=len(inner),
        state_size=cfg.state,
        expand=max(1, round(inner[0] / cfg.d)),
        conv_kernel=cfg.conv,
        time_step_rank=cfg.dt_rank,
        use_bias="in_proj" in cfg.biases,
        use_conv_bias="conv1d" in cfg.biases,
        hidden_act="silu",
        layer_norm_epsilon=cfg.norm_eps,
        residual_in_fp32=cfg.residual_in_fp32,
        tie_word_embeddings=cfg.tie_embeddings,
        bos_token_id=cfg.bos_id,
        eos_token_id=cfg.eos_ids[0] if len(cfg.eos_ids) == 1 else list(cfg.eos_ids) or None,
        pad_token_id=cfg.pad_id,
    )
    return config | (dict(intermediate_size=inner[0]) if plain else {INNER_KEY: inner})


def problems(cfg: MambaConfig) -> list[str]:
    """In words, why transformers cannot load a model; nothing if it can."""
    widths = {dims.inner for dims in cfg.layers}
    if len(widths) == 1:
        return []
    return [
        f"its layers have {min(widths)} to {max(widths)} inner channels, and MambaForCausalLM of transformers makes all "
        "equally wide; prune with --ranking local"
    ]


def tensor_name() -> Callable[[str, int | None], str]:
    """(array name, layer of the model) -> tensor name in a file."""
    return lambda array, layer: TOP[array] if layer is None else f"backbone.layers.{layer}.{NAMES[array]}"
