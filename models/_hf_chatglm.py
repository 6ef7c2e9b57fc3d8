"""ChatGLM3 and GLM-4-9B as first published, with code of their own: the `config.json` of GLM and its tensors by other names."""

from typing import Any

from jaxprune.models._families import FAMILIES
from jaxprune.models._hf_layers import architecture, number, positive

ARCHITECTURES = ("ChatGLMModel", "ChatGLMForConditionalGeneration")
MODEL_TYPE = "chatglm"
TABLE = FAMILIES["glm"]._replace(
    layers="transformer.encoder.layers",
    names=dict(
        embed="transformer.embedding.word_embeddings.weight",
        norm="transformer.encoder.final_layernorm.weight",
        head="transformer.output_layer.weight",
        o="self_attention.dense.weight",
        down="mlp.dense_4h_to_h.weight",
    ),
    fused={
        "self_attention.query_key_value.weight": ("q", "k", "v"),
        "self_attention.query_key_value.bias": ("q_bias", "k_bias", "v_bias"),
        "mlp.dense_h_to_4h.weight": ("gate", "up"),
    },
)
SIZES = dict(
    num_hidden_layers="num_layers",
    hidden_size="hidden_size",
    intermediate_size="ffn_hidden_size",
    num_attention_heads="num_attention_heads",
    num_key_value_heads="multi_query_group_num",
    head_dim="kv_channels",
    vocab_size="padded_vocab_size",
    max_position_embeddings="seq_length",
)  # key of GLM -> key of ChatGLM
ALLOWED: dict[str, tuple[Any, str]] = dict(
    multi_query_attention=(True, "its query_key_value goes head by head"),
    rmsnorm=(True, "its norms are LayerNorm"),
    post_layer_norm=(True, "it has no last norm"),
    apply_residual_connection_post_layernorm=(False, "its residual stream is normalised"),
    add_bias_linear=(False, "all its matrices have biases"),
    original_rope=(True, "its rotary pairs are not neighbours"),
    pre_seq_len=(None, "it has a prefix encoder"),
    quantization_bit=(0, "it is quantised"),
    position_encoding_2d=(None, "it is a ChatGLM-6B, the first"),
    inner_hidden_size=(None, "it is a ChatGLM-6B, the first"),
    vision_config=(None, "it reads images"),
    rope_scaling=(None, "ChatGLM's own code does not read it"),
)  # key -> what it must be if it is there, what other values mean
VOCABULARY = 65024  # of ChatGLM2 and 3


def is_chatglm(config: dict[str, Any]) -> bool:
    """Is this the `config.json` of ChatGLM's own code?"""
    named = architecture(config)
    return named in ARCHITECTURES if named else config.get("model_type") == MODEL_TYPE


def with_glm_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` of ChatGLM with the keys that GLM has instead; that of any other model as it is.

    Raises:
      ValueError: a setting that GLM does not have, or a key that is missing or malformed.
    """
    if not is_chatglm(config):
        return config
    _refuse(dict(multi_query_attention=False) | config)  # which is what a file that leaves it out means
    ratio = number(config, "rope_ratio", 1.0)
    sizes = {key: positive(config, theirs) for key, theirs in SIZES.items()}
    if ratio != 1.0 and sizes["vocab_size"] == VOCABULARY and "chatglm3" not in str(config.get("_name_or_path")).lower():
        raise ValueError(
            f"config.json: rope_ratio {ratio} given; ChatGLM2 divides positions by it, which is not supported, ChatGLM3 "
            'multiplies the base; if it is a ChatGLM3, set "_name_or_path": "chatglm3-6b-32k"'
        )
    return {
        **config,
        **sizes,
        "rms_norm_eps": number(config, "layernorm_epsilon", 1e-5),
        "attention_bias": bool(config.get("add_qkv_bias")),
        "rope_parameters": dict(rope_type="default", rope_theta=10000.0 * ratio, partial_rotary_factor=0.5),
        "eos_token_id": config.get("eos_token_id"),
        "pad_token_id": config.get("pad_token_id"),
    }


def _refuse(config: dict[str, Any]) -> None:
    for key, (allowed, meaning) in ALLOWED.items():
        given = config.get(key, allowed)
        if bool(given) != bool(allowed):
            value = "an object" if isinstance(given, dict) else repr(given)
            raise ValueError(
                f"config.json: {key} {value} given ({meaning}); allowed is {allowed!r}; use a ChatGLM3-6B or GLM-4-9B"
            )
