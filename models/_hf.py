"""`config.json` of Hugging Face: what it says about a model, and how a pruned model says it."""

from typing import Any

from jaxprune.models._hf_layers import layer_to_hf, layers_from_hf, number, positive, widths
from jaxprune.models._hf_rope import rope_from_hf, rope_to_hf
from jaxprune.models.config import LayerDims, LlamaConfig

ARCHITECTURES = dict(llama="LlamaForCausalLM", mistral="MistralForCausalLM", qwen2="Qwen2ForCausalLM")
OURS = dict(jaxprune_llama="JaxpruneLlamaForCausalLM")
DEFAULTS: dict[str, dict[str, Any]] = dict(  # of transformers, where a family's config.json leaves a key out
    llama=dict(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2),
    mistral=dict(max_position_embeddings=131072, bos_token_id=1, eos_token_id=2, num_key_value_heads=8, sliding_window=4096),
    qwen2=dict(max_position_embeddings=32768, num_key_value_heads=32),
    jaxprune_llama={},
)
BIASES_KEY, GONE_KEY, FAMILY_KEY = "jaxprune_biases", "jaxprune_gone_layers", "jaxprune_family"
SHORTCUTS_KEY, NORM_KEY = "jaxprune_shortcuts", "jaxprune_norm_width"
MODULE = "modeling_jaxprune"  # what transformers loads beside the weights of a model that none of its own classes can be
AUTO_MAP = dict(AutoConfig=f"{MODULE}.JaxpruneLlamaConfig", AutoModelForCausalLM=f"{MODULE}.JaxpruneLlamaForCausalLM")


def from_hf_config(config: dict[str, Any]) -> LlamaConfig:
    """The model that a `config.json` describes.

    Reads the keys of transformers 4 and 5 (`per_layer_config`, and rope in both spellings) and two of ours: `jaxprune_biases`,
    the biases that are not zero by construction, and `jaxprune_gone_layers`, the positions of layers that the file leaves out.
    In files of `jaxprune_llama` also `jaxprune_shortcuts` and `jaxprune_norm_width`, see `LlamaConfig`.

    Raises:
      ValueError: an architecture or a setting that is not supported, or a key that is missing or malformed.

    >>> from jaxprune.models import from_hf_config
    >>> cfg = from_hf_config(dict(model_type="llama", vocab_size=64, hidden_size=32, num_hidden_layers=2,
    ...                           num_attention_heads=4, num_key_value_heads=2, intermediate_size=48))
    >>> cfg.layers, cfg.head_dim
    ((LayerDims(kv_heads=2, q_per_kv=2, ff=48), LayerDims(kv_heads=2, q_per_kv=2, ff=48)), 8)
    """
    family = _family(config)
    config = DEFAULTS[family] | config
    _refuse(config, family)
    n, d = positive(config, "num_hidden_layers"), positive(config, "hidden_size")
    layers = layers_from_hf(config, n)
    for position in sorted(config.get(GONE_KEY) or []):
        layers.insert(position, LayerDims(0, 0, 0))
    absent = config.get("head_dim") is None
    head_dim = d // positive(config, "num_attention_heads") if absent else positive(config, "head_dim")
    theta, scaling = rope_from_hf(config, head_dim)
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
        sliding_window=config.get("sliding_window") if family in ("mistral", "jaxprune_llama") else None,
        shortcuts=family in OURS and bool(config.get(SHORTCUTS_KEY, False)),
        norm_width=positive(config, NORM_KEY) if family in OURS and NORM_KEY in config else None,
        family=config.get(FAMILY_KEY, "llama") if family in OURS else family,
        bos_id=config.get("bos_token_id"),
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        pad_id=config.get("pad_token_id"),
    )


def to_hf_config(cfg: LlamaConfig) -> dict[str, Any]:
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
      read it stops with an error instead of building another model. `jaxprune_shortcuts` and `jaxprune_norm_width` are there
      only if they are set. The rotary kind `grid` is unknown to transformers: then there is no `auto_map`.

    >>> from jaxprune.models import LayerDims, LlamaConfig, to_hf_config
    >>> cfg = LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 48), LayerDims(1, 3, 40)))
    >>> to_hf_config(cfg)["per_layer_config"]["1"]
    {'num_attention_heads': 3, 'num_key_value_heads': 1, 'intermediate_size': 40}
    """
    alive = [dims for dims in cfg.layers if cfg.layer_arrays(dims)]
    rotated = cfg.shortcuts or cfg.norm_width is not None
    equal = len(set(alive)) == 1 and bool(alive[0].kv_heads and alive[0].ff) and not rotated
    sayable = [f for f in (cfg.family, *ARCHITECTURES) if equal and can_say(f, cfg, alive[0])]
    family = sayable[0] if sayable else "jaxprune_llama"
    plain = family in ARCHITECTURES
    theta, scaling, rope = rope_to_hf(cfg)
    config: dict[str, Any] = dict(
        architectures=[(ARCHITECTURES | OURS)[family]],
        model_type=family,
        vocab_size=cfg.vocab,
        hidden_size=cfg.d,
        head_dim=cfg.head_dim,
        num_hidden_layers=len(alive if plain else cfg.layers),
        **widths(alive[0] if plain else LayerDims(0, 0, 0)),
        hidden_act="silu",
        rms_norm_eps=cfg.norm_eps,
        max_position_embeddings=cfg.max_positions,
        rope_parameters=rope,
        tie_word_embeddings=cfg.tie_embeddings,
        bos_token_id=cfg.bos_id,
        eos_token_id=cfg.eos_ids[0] if len(cfg.eos_ids) == 1 else list(cfg.eos_ids) or None,
        pad_token_id=cfg.pad_id,
    )
    if family == "llama":
        config |= dict(
            attention_bias=bool(set(cfg.biases) & set("qkvo")), mlp_bias=bool({"gate", "up", "down"} & set(cfg.biases))
        )
    elif family == "qwen2":
        config |= dict(use_sliding_window=False)
    else:
        config |= dict(sliding_window=cfg.sliding_window)
    if plain:
        config |= dict(rope_theta=theta, rope_scaling=scaling)  # as transformers 4 reads it
    if plain and scaling and scaling["rope_type"] == "longrope":  # transformers 4 looks for it here only
        config |= dict(original_max_position_embeddings=scaling["original_max_position_embeddings"])
    if family in OURS or stored_biases(config) != cfg.biases:
        config[BIASES_KEY] = list(cfg.biases)
    if not plain:
        config[FAMILY_KEY] = cfg.family
        config |= {"auto_map": AUTO_MAP} if dict(cfg.rope_scaling).get("rope_type") != "grid" else {}
        config |= {SHORTCUTS_KEY: True} if cfg.shortcuts else {}
        config |= {} if cfg.norm_width is None else {NORM_KEY: cfg.norm_width}
        config["per_layer_config"] = {str(i): layer_to_hf(dims) for i, dims in enumerate(cfg.layers)}
    elif len(alive) < len(cfg.layers):
        config[GONE_KEY] = [i for i, dims in enumerate(cfg.layers) if not cfg.layer_arrays(dims)]
    return config


def stored_biases(config: dict[str, Any]) -> tuple[str, ...]:
    """Which matrices have a bias in a file with this `config.json`."""
    family = _family(config)
    if family in OURS:
        return tuple(config[BIASES_KEY])
    attention = ("q", "k", "v", "o") if family == "llama" and config.get("attention_bias") else ()
    mlp = ("gate", "up", "down") if family == "llama" and config.get("mlp_bias") else ()
    return ("q", "k", "v") if family == "qwen2" else attention + mlp


def numbering(config: dict[str, Any]) -> dict[int, int]:
    """Layer of the model -> its number in a file with this `config.json`; layers that the file leaves out are absent."""
    gone = set(config.get(GONE_KEY) or [])
    alive = [i for i in range(config["num_hidden_layers"] + len(gone)) if i not in gone]
    return {layer: number for number, layer in enumerate(alive)}


def _family(config: dict[str, Any]) -> str:
    listed = config.get("architectures")
    named = listed[0] if isinstance(listed, list) and listed else listed or None
    known = ARCHITECTURES | OURS
    family = config.get("model_type") if named is None else {v: k for k, v in known.items()}.get(str(named))
    if family not in known:
        raise ValueError(
            f"config.json: architecture {named or config.get('model_type')!r} is not supported; "
            f"supported are {', '.join(ARCHITECTURES.values())}"
        )
    return family


def _refuse(config: dict[str, Any], family: str) -> None:
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"config.json: hidden_act {config['hidden_act']!r} is not supported; supported is 'silu'")
    if config.get("quantization_config"):
        raise ValueError("config.json: quantization_config is set; quantised checkpoints can only be read as GGUF")
    if family == "qwen2" and (config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or [])):
        raise ValueError(
            "config.json: use_sliding_window is true, so only some layers see a window; set it to false to ignore it"
        )
    biases = config.get(BIASES_KEY, [])
    if family in OURS and BIASES_KEY not in config:
        raise ValueError(
            f"config.json: model_type jaxprune_llama without {BIASES_KEY}; the folder was not written by this library"
        )
    if family not in OURS and (extra := sorted(set(biases) - set(stored_biases(config)))):
        raise ValueError(f"config.json: {BIASES_KEY} names {extra[0]!r}, for which this file has no bias")
    gone, n = config.get(GONE_KEY) or [], positive(config, "num_hidden_layers")
    if len(set(gone)) < len(gone) or set(gone) - set(range(n + len(gone))):
        raise ValueError(f"config.json: {GONE_KEY} {gone} given; allowed are distinct numbers from 0 to {n + len(gone) - 1}")


def can_say(family: str, cfg: LlamaConfig, dims: LayerDims) -> bool:
    """Can transformers' own class of this family be a model with the settings of `cfg` and all layers of widths `dims`?"""
    if cfg.sliding_window is not None and family != "mistral" or dict(cfg.rope_scaling).get("rope_type") == "grid":
        return False
    divisible = cfg.d % (dims.kv_heads * dims.q_per_kv) == 0
    return dict(llama=divisible, mistral=not cfg.biases, qwen2=set(cfg.biases) == set("qkv"))[family]
