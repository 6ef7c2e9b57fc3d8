"""What differs between the families of transformers that share LLaMA's shape: a family is one entry of this table."""

import math

from jaxprune.models._family import TRAITS, Family
from jaxprune.models.config import LayerDims, LlamaConfig

OURS = "jaxprune_llama"  # what no family can say, see `jaxprune.models.to_hf_config`
LIKE_LLAMA = ("llama", "mistral", "qwen2")  # tried in this order for a model that its own family cannot say
REFUSED = dict(Gemma3ForConditionalGeneration="it reads images, too")  # architecture -> why
LEGACY_ACTIVATION = ("gemma",)  # whose first files say `gelu` and mean `gelu_pytorch_tanh`, as transformers reads them


def _divisible(cfg: LlamaConfig, dims: LayerDims) -> bool:
    return cfg.d % (dims.kv_heads * dims.q_per_kv) == 0


def _gemma_2(cfg: LlamaConfig, dims: LayerDims) -> bool:
    return _divisible(cfg, dims) and bool(cfg.windowed) and cfg.score_width is not None


def _phi3(cfg: LlamaConfig, dims: LayerDims) -> bool:
    scaling = dict(cfg.rope_scaling)
    if scaling:  # its length is checked against a head of hidden_size / heads
        heads = dims.kv_heads * dims.q_per_kv
        return scaling["rope_type"] == "longrope" and cfg.d // heads == cfg.head_dim
    return True


GATE_UP: dict[str, tuple[str, ...]] = {"mlp.gate_up_proj.weight": ("gate", "up")}
GLM = dict(  # defaults
    max_position_embeddings=131072,
    num_key_value_heads=2,
    head_dim=128,
    rms_norm_eps=1.5625e-7,
    partial_rotary_factor=0.5,
    attention_bias=True,
    pad_token_id=151329,
    eos_token_id=[151329, 151336, 151338],
)
GEMMA = dict(norm_offset=True, embed_scale=math.sqrt, activation="gelu_pytorch_tanh")  # fixed
GEMMA_DEFAULTS = dict(
    max_position_embeddings=8192,
    head_dim=256,
    tie_word_embeddings=True,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
)
GEMMA_BIASES: dict[str, tuple[str, ...]] = dict(attention_bias=("q", "k", "v", "o"))
GEMMA_2_DEFAULTS = GEMMA_DEFAULTS | dict(num_key_value_heads=4, sliding_window=4096, query_pre_attn_scalar=256)
GEMMA_2_KEYS = dict(activation="hidden_activation")
GEMMA_2_NAMES = dict(
    attn_post_norm="post_attention_layernorm.weight",
    mlp_norm="pre_feedforward_layernorm.weight",
    mlp_post_norm="post_feedforward_layernorm.weight",
)
FAMILIES = dict(
    llama=Family(
        "LlamaForCausalLM",
        defaults=dict(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2),
        biases=dict(attention_bias=("q", "k", "v", "o"), mlp_bias=("gate", "up", "down")),
        says=_divisible,
    ),
    mistral=Family(
        "MistralForCausalLM",
        defaults=dict(
            max_position_embeddings=131072, bos_token_id=1, eos_token_id=2, num_key_value_heads=8, sliding_window=4096
        ),
        free=("sliding_window",),
    ),
    qwen2=Family(
        "Qwen2ForCausalLM",
        defaults=dict(max_position_embeddings=32768, num_key_value_heads=32),
        constants=dict(use_sliding_window=False),
        always=("q", "k", "v"),
    ),
    qwen3=Family(
        "Qwen3ForCausalLM",
        defaults=dict(max_position_embeddings=32768, num_key_value_heads=32, head_dim=128),
        constants=dict(use_sliding_window=False),
        fixed=dict(qk_norm=True),
        biases=dict(attention_bias=("q", "k", "v", "o")),
    ),
    phi3=Family(
        "Phi3ForCausalLM",
        defaults=dict(
            max_position_embeddings=4096,
            original_max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=32000,
            pad_token_id=32000,
        ),
        free=("sliding_window", "partial_rotary"),
        says=_phi3,
        fused={"self_attn.qkv_proj.weight": ("q", "k", "v")} | GATE_UP,
    ),
    glm=Family(
        "GlmForCausalLM",
        defaults=GLM,
        free=("partial_rotary",),
        biases=dict(attention_bias=("q", "k", "v")),
        fused=GATE_UP,
        interleaved=True,
    ),
    glm4=Family(
        "Glm4ForCausalLM",
        defaults=GLM,
        fixed=dict(post_norms=True),
        free=("partial_rotary",),
        biases=dict(attention_bias=("q", "k", "v")),
        names=dict(attn_post_norm="post_self_attn_layernorm.weight", mlp_post_norm="post_mlp_layernorm.weight"),
        fused=GATE_UP,
        interleaved=True,
    ),
    gemma=Family(
        "GemmaForCausalLM",
        defaults=GEMMA_DEFAULTS | dict(num_key_value_heads=16),
        fixed=GEMMA,
        biases=GEMMA_BIASES,
    ),
    gemma2=Family(
        "Gemma2ForCausalLM",
        defaults=GEMMA_2_DEFAULTS
        | dict(
            sliding_window_pattern=2,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
        ),
        fixed=GEMMA | dict(post_norms=True),
        free=("sliding_window", "windowed", "score_width", "score_cap", "logit_cap"),
        keys=GEMMA_2_KEYS,
        biases=GEMMA_BIASES,
        says=_gemma_2,
        names=GEMMA_2_NAMES,
    ),
    gemma3_text=Family(
        "Gemma3ForCausalLM",
        defaults=GEMMA_2_DEFAULTS
        | dict(
            sliding_window_pattern=6,
            max_position_embeddings=131072,
            rope_theta=1000000.0,
            rope_local_base_freq=10000.0,
        ),
        fixed=GEMMA | dict(post_norms=True, qk_norm=True),
        free=("sliding_window", "windowed", "local_rope_theta", "score_width", "logit_cap"),
        keys=GEMMA_2_KEYS,
        biases=GEMMA_BIASES,
        says=lambda cfg, dims: _gemma_2(cfg, dims) and cfg.local_rope_theta is not None,
        names=GEMMA_2_NAMES,
    ),
    jaxprune_llama=Family("JaxpruneLlamaForCausalLM", free=tuple(TRAITS)),
)
