"""`config.json` of Hugging Face: what it says about a model, and how a pruned model says it."""

from typing import Any

from jaxprune.models import _hf_chatglm, _hf_mamba
from jaxprune.models._families import FAMILIES, LIKE_LLAMA, OURS, REFUSED
from jaxprune.models._family import KEYS, TRAITS, Family, beyond_llama
from jaxprune.models._hf_kinds import kinds_of_rope, rope_by_kind
from jaxprune.models._hf_layers import PAIRS, architecture, layer_to_hf, layers_from_hf, number, positive, widths
from jaxprune.models._hf_rope import OWN_LENGTH, partial_from_hf, rope_from_hf, rope_to_hf
from jaxprune.models._hf_traits import GONE_KEY, fixed, traits_from_hf, traits_to_hf
from jaxprune.models.config import LayerDims, LlamaConfig
from jaxprune.models.mamba_config import MambaConfig
from jaxprune.models.types import Config

BIASES_KEY, FAMILY_KEY = "jaxprune_biases", "jaxprune_family"
SHORTCUTS_KEY, NORM_KEY = "jaxprune_shortcuts", "jaxprune_norm_width"
MODULE = "modeling_jaxprune"  # what transformers loads beside the weights of a model that none of its own classes can be
AUTO_MAP = dict(AutoConfig=f"{MODULE}.JaxpruneLlamaConfig", AutoModelForCausalLM=f"{MODULE}.JaxpruneLlamaForCausalLM")


def from_hf_config(config: dict[str, Any]) -> Config:
    """The model that a `config.json` describes.

    Reads keys of transformers 4 and 5 (`per_layer_config`, and rope in both spellings) and three of ours: `jaxprune_biases`,
    the biases that are not zero by construction, `jaxprune_gone_layers`, the positions of layers that the file leaves out, and
    `jaxprune_gone_layer_types`, what `layer_types` would say of them.
    Files of Mamba and of ChatGLM have keys of their own, see `_hf_mamba` and `_hf_chatglm`.
    In files of `jaxprune_llama` also those of the settings of `LlamaConfig` that LLaMA does not have, as `jaxprune_qk_norm`.

    Raises:
      ValueError: an architecture or a setting that is not supported, or a key that is missing or malformed.

    >>> from jaxprune.models import from_hf_config
    >>> cfg = from_hf_config(dict(model_type="llama", vocab_size=64, hidden_size=32, num_hidden_layers=2,
    ...                           num_attention_heads=4, num_key_value_heads=2, intermediate_size=48))
    >>> cfg.layers, cfg.head_dim
    ((LayerDims(kv_heads=2, q_per_kv=2, ff=48), LayerDims(kv_heads=2, q_per_kv=2, ff=48)), 8)
    """
    if _hf_mamba.is_mamba(config):
        return _hf_mamba.from_hf(config)
    config = _hf_chatglm.with_glm_keys(config)
    family = _family(config)
    config = {**FAMILIES[family].defaults, **config}
    if "local_rope_theta" in FAMILIES[family].free:
        config = rope_by_kind(config, KEYS["local_rope_theta"])
    config[KEYS["partial_rotary"]] = partial_from_hf(config)
    _refuse(config, family)
    n, d = positive(config, "num_hidden_layers"), positive(config, "hidden_size")
    layers = layers_from_hf(config, n)
    for position in sorted(config.get(GONE_KEY) or []):
        layers.insert(position, LayerDims(0, 0, 0))
    absent = config.get("head_dim") is None
    head_dim = d // positive(config, "num_attention_heads") if absent else positive(config, "head_dim")
    traits = traits_from_hf(config, family, d)
    theta, scaling = rope_from_hf(config, int(head_dim * traits["partial_rotary"]))
    eos = config.get("eos_token_id")
    return LlamaConfig(
        vocab=positive(config, "vocab_size"),
        d=d,
        head_dim=head_dim,
        layers=tuple(layers),
        norm_eps=number(config, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=positive(config, "max_position_embeddings"),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        biases=tuple(config[BIASES_KEY]) if BIASES_KEY in config else stored_biases(config),
        shortcuts=family == OURS and bool(config.get(SHORTCUTS_KEY, False)),
        norm_width=positive(config, NORM_KEY) if family == OURS and NORM_KEY in config else None,
        family=config.get(FAMILY_KEY, "llama") if family == OURS else family,
        bos_id=config.get("bos_token_id"),
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        pad_id=config.get("pad_token_id"),
        **traits,
    )


def to_hf_config(cfg: Config) -> dict[str, Any]:
    """The `config.json` that says what this model is, as plainly as it can be said.

    - All layers equal: a plain configuration, which transformers 4 and 5 load. Layers of which nothing is left are not in the
      file; `jaxprune_gone_layers` holds their positions. Biases that the family stores only together (`attention_bias`:
      q k v o; `mlp_bias`: gate up down) are stored as zeros where the model has none, and `jaxprune_biases` names the real
      ones. The family is the model's own, or the first of llama, mistral and qwen2 that can say it: the three differ only in
      biases, in `sliding_window`, and in that llama wants `hidden_size` to be a multiple of the number of heads.
    - Otherwise, and with shortcuts or a norm width: `model_type` is `jaxprune_llama`, with `per_layer_config` in the schema of
      transformers 5, every layer in full, and `"skip": ["attention", "mlp"]` for what is gone. `auto_map` names the classes in
      `modeling_jaxprune.py`, which `save` writes beside the weights: transformers loads them with `trust_remote_code=True` and
      refuses the folder without. The widths outside `per_layer_config` are 0, so that a class of transformers that is made to
      read it stops with an error instead of building another model. `jaxprune_shortcuts`, `jaxprune_norm_width`,
      `jaxprune_qk_norm` and so on are there only if they are set, as is `jaxprune_rotary_pairs` of a layer. Tensors are
      LLaMA's, each array its own, in the order of dimensions that this library computes with. What that file cannot compute,
      the rotary kind `grid` and the norms and partial rotations of other families, has no `auto_map`.

    >>> from jaxprune.models import LayerDims, LlamaConfig, to_hf_config
    >>> cfg = LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 48), LayerDims(1, 3, 40)))
    >>> to_hf_config(cfg)["per_layer_config"]["1"]
    {'num_attention_heads': 3, 'num_key_value_heads': 1, 'intermediate_size': 40}
    """
    if isinstance(cfg, MambaConfig):
        return _hf_mamba.to_hf(cfg)
    alive = [dims for dims in cfg.layers if cfg.layer_arrays(dims)]
    rotated = cfg.shortcuts or cfg.norm_width is not None
    equal = len(set(alive)) == 1 and bool(alive[0].kv_heads and alive[0].ff) and not rotated and alive[0].pairs is None
    sayable = [f for f in (cfg.family, *LIKE_LLAMA) if equal and can_say(f, cfg, alive[0])]
    family = sayable[0] if sayable else OURS
    table, plain = FAMILIES[family], family != OURS
    gone = [i for i, dims in enumerate(cfg.layers) if plain and not cfg.layer_arrays(dims)]
    theta, scaling, rope = rope_to_hf(cfg)
    config: dict[str, Any] = dict(
        architectures=[table.architecture],
        model_type=family,
        vocab_size=cfg.vocab,
        hidden_size=cfg.d,
        head_dim=cfg.head_dim,
        num_hidden_layers=len(alive if plain else cfg.layers),
        **widths(alive[0] if plain else LayerDims(0, 0, 0)),
        rms_norm_eps=cfg.norm_eps,
        max_position_embeddings=cfg.max_positions,
        rope_parameters=kinds_of_rope(cfg, rope) if plain else rope,
        tie_word_embeddings=cfg.tie_embeddings,
        bos_token_id=cfg.bos_id,
        eos_token_id=cfg.eos_ids[0] if len(cfg.eos_ids) == 1 else list(cfg.eos_ids) or None,
        pad_token_id=cfg.pad_id,
    )
    config |= {key: bool(set(cfg.biases) & set(names)) for key, names in table.biases.items()} | table.constants
    config |= traits_to_hf(cfg, family, gone)
    if OWN_LENGTH in table.defaults:
        config[OWN_LENGTH] = dict(cfg.rope_scaling).get(OWN_LENGTH, table.defaults[OWN_LENGTH])
    if plain:
        config |= dict(rope_theta=theta, rope_scaling=scaling)  # as transformers 4 reads it
    if plain and scaling and scaling["rope_type"] == "longrope":  # transformers 4 looks for it here only
        config |= dict(original_max_position_embeddings=scaling["original_max_position_embeddings"])
    if not plain or stored_biases(config) != cfg.biases:
        config[BIASES_KEY] = list(cfg.biases)
    if not plain:
        config[FAMILY_KEY] = cfg.family
        unknown = beyond_llama(cfg) or dict(cfg.rope_scaling).get("rope_type") == "grid"
        config |= {} if unknown else {"auto_map": AUTO_MAP}
        config |= {SHORTCUTS_KEY: True} if cfg.shortcuts else {}
        config |= {} if cfg.norm_width is None else {NORM_KEY: cfg.norm_width}
        config["per_layer_config"] = {str(i): layer_to_hf(dims) for i, dims in enumerate(cfg.layers)}
        # transformers 5 wants what some layers say to be said for the others, too
        config |= {PAIRS: None} if any(dims.pairs is not None for dims in cfg.layers) else {}
    elif gone:
        config[GONE_KEY] = gone
    return config


def stored_biases(config: dict[str, Any]) -> tuple[str, ...]:
    """Which matrices have a bias in a file with this `config.json`."""
    if _hf_mamba.is_mamba(config):
        return _hf_mamba.from_hf(config).biases
    family = _family(config)
    if family == OURS:
        return tuple(config[BIASES_KEY])
    table = FAMILIES[family]
    set_by = [names for key, names in table.biases.items() if config.get(key, table.defaults.get(key))]
    return sum(set_by, table.always)


def table_of(config: dict[str, Any]) -> Family:
    """The entry of the family of a file with this `config.json`."""
    return _hf_chatglm.TABLE if _hf_chatglm.is_chatglm(config) else FAMILIES[_family(config)]


def numbering(config: dict[str, Any]) -> dict[int, int]:
    """Layer of the model -> its number in a file with this `config.json`; layers that the file leaves out are absent."""
    gone = set(config.get(GONE_KEY) or [])
    alive = [i for i in range(config["num_hidden_layers"] + len(gone)) if i not in gone]
    return {layer: number for number, layer in enumerate(alive)}


def _family(config: dict[str, Any]) -> str:
    if _hf_chatglm.is_chatglm(config):
        return "glm"
    named = architecture(config)
    by_architecture = {table.architecture: family for family, table in FAMILIES.items()}
    family = config.get("model_type") if named is None else by_architecture.get(str(named))
    if family not in FAMILIES:
        supported = ", ".join(table.architecture for name, table in FAMILIES.items() if name != OURS)
        supported += f", {_hf_mamba.ARCHITECTURE}, {', '.join(_hf_chatglm.ARCHITECTURES)}"
        why = f" ({REFUSED[named]})" if named in REFUSED else ""
        raise ValueError(
            f"config.json: architecture {named or config.get('model_type')!r} is not supported{why}; supported are {supported}"
        )
    return family


def _refuse(config: dict[str, Any], family: str) -> None:
    if config.get("quantization_config"):
        raise ValueError("config.json: quantization_config is set; quantised checkpoints can only be read as GGUF")
    if config.get("use_bidirectional_attention"):
        raise ValueError(
            "config.json: use_bidirectional_attention is true; supported are models whose tokens attend to earlier ones"
        )
    table = FAMILIES[family]
    windows = config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or [])
    if windows and "use_sliding_window" in table.constants:
        raise ValueError(
            "config.json: use_sliding_window is true, so only some layers see a window; set it to false to ignore it"
        )
    if (partial := config[KEYS["partial_rotary"]]) != 1.0 and "partial_rotary" not in table.free:
        raise ValueError(f"config.json: partial_rotary_factor {partial} is not supported; supported is 1.0")
    biases = config.get(BIASES_KEY, [])
    if family == OURS and BIASES_KEY not in config:
        raise ValueError(
            f"config.json: model_type jaxprune_llama without {BIASES_KEY}; the folder was not written by this library"
        )
    if family != OURS and (extra := sorted(set(biases) - set(stored_biases(config)))):
        raise ValueError(f"config.json: {BIASES_KEY} names {extra[0]!r}, for which this file has no bias")
    gone, n = config.get(GONE_KEY) or [], positive(config, "num_hidden_layers")
    if len(set(gone)) < len(gone) or set(gone) - set(range(n + len(gone))):
        raise ValueError(f"config.json: {GONE_KEY} {gone} given; allowed are distinct numbers from 0 to {n + len(gone) - 1}")


def can_say(family: str, cfg: LlamaConfig, dims: LayerDims) -> bool:
    """Can transformers' own class of this family be a model with the settings of `cfg` and all layers of widths `dims`?"""
    table = FAMILIES[family]
    if not table.says(cfg, dims) or dict(cfg.rope_scaling).get("rope_type") == "grid":
        return False
    possible = set(sum(table.biases.values(), table.always))
    traits = TRAITS | fixed(table, cfg.d)
    same = all(getattr(cfg, trait) == value for trait, value in traits.items() if trait not in table.free)
    return same and set(table.always) <= set(cfg.biases) <= possible
