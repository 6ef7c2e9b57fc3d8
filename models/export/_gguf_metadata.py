"""The metadata of a GGUF file: what llama.cpp reads of a model and its tokenizer, and our own configuration."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from jaxprune.models import _hf, _rope
from jaxprune.models._gguf_blocks import CONFIG_KEY, blocks
from jaxprune.models._gguf_tokenizer import Vocabulary
from jaxprune.models.config import LlamaConfig

if TYPE_CHECKING:
    from gguf import GGUFWriter


def add_model(out: "GGUFWriter", cfg: LlamaConfig, quantization: str) -> None:
    """Adds everything but the tokenizer: per-layer arrays where the blocks differ, plain numbers where they are equal."""
    import gguf

    found = [block.stored for block in blocks(cfg)]
    equal = len(set(found)) == 1

    def widths(values: list[int]) -> Any:
        return values[0] if equal else values

    out.add_type(gguf.GGUFType.MODEL)
    out.add_file_type(_file_type(quantization))
    out.add_quantization_version(gguf.GGML_QUANT_VERSION)
    out.add_vocab_size(cfg.vocab)
    out.add_context_length(cfg.max_positions)
    out.add_embedding_length(cfg.d)
    out.add_block_count(len(found))
    out.add_feed_forward_length(widths([dims.ff for dims in found]))
    out.add_head_count(widths([dims.kv_heads * dims.q_per_kv for dims in found]))
    out.add_head_count_kv(widths([dims.kv_heads for dims in found]))
    out.add_key_length(cfg.head_dim)
    out.add_value_length(cfg.head_dim)
    out.add_rope_dimension_count(cfg.head_dim)
    out.add_rope_freq_base(cfg.rope_theta)
    out.add_layer_norm_rms_eps(cfg.norm_eps)
    _add_rope_scaling(out, cfg)
    out.add_string(CONFIG_KEY, json.dumps(_hf.to_hf_config(cfg)))


def add_tokenizer(out: "GGUFWriter", v: Vocabulary | None) -> None:
    """Adds the tokenizer; None is the vocabulary of numbers alone, which llama.cpp calls `no_vocab`."""
    if v is None:
        out.add_tokenizer_model("no_vocab")
        return
    out.add_tokenizer_model(v.kind)
    out.add_tokenizer_pre(v.pre)
    out.add_token_list(v.tokens)
    out.add_token_types(v.types)
    if v.kind == "llama":
        out.add_token_scores(v.scores)
    else:
        out.add_token_merges(v.merges)
    add = dict(bos=out.add_bos_token_id, eos=out.add_eos_token_id, unk=out.add_unk_token_id, pad=out.add_pad_token_id)
    for name, i in v.special.items():
        add[name](i)
    out.add_add_bos_token(v.add_bos)
    if v.add_eos:
        out.add_add_eos_token(True)
    out.add_add_space_prefix(v.space_prefix)
    if v.chat_template is not None:
        out.add_chat_template(v.chat_template)


def rope_problem(cfg: LlamaConfig) -> str | None:
    """Why the rotary scaling cannot be said, or None."""
    s = dict(cfg.rope_scaling)
    kind = s.get("rope_type", "default")
    if kind in ("dynamic", "grid"):
        return f"rope scaling {kind!r}: GGUF can say none, linear, yarn, longrope and llama3; use one of these"
    if kind == "yarn":
        plain = dict(rope_type="yarn", factor=_factor(cfg), original_max_position_embeddings=_original(cfg))
        bare = dataclasses.replace(cfg, rope_scaling=tuple(sorted(plain.items())))
        ours, theirs = (_rope.frequencies(c, 1) for c in (cfg, bare))
        if ours[1] != theirs[1] or (ours[0] != theirs[0]).any():
            return (
                "rope scaling 'yarn' with settings of its own: GGUF can say factor and original_max_position_embeddings; leave "
                "beta_fast, beta_slow, attention_factor, mscale, mscale_all_dim and truncate at their defaults"
            )
    return None


def _add_rope_scaling(out: "GGUFWriter", cfg: LlamaConfig) -> None:
    import gguf

    kind = dict(cfg.rope_scaling).get("rope_type")
    if kind in ("linear", "yarn"):
        out.add_rope_scaling_type(gguf.RopeScalingType(kind))
        out.add_rope_scaling_factor(_factor(cfg))
    if kind == "longrope":
        out.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        out.add_rope_scaling_attn_factors(_rope.frequencies(cfg, 1)[1])
    if kind in ("yarn", "longrope"):
        out.add_rope_scaling_orig_ctx_len(_original(cfg))


def _original(cfg: LlamaConfig) -> int:
    return dict(cfg.rope_scaling).get("original_max_position_embeddings") or cfg.max_positions


def _factor(cfg: LlamaConfig) -> float:
    return dict(cfg.rope_scaling).get("factor") or cfg.max_positions / _original(cfg)


def _file_type(quantization: str) -> int:
    from gguf import LlamaFileType

    return LlamaFileType["ALL_F32" if quantization == "f32" else f"MOSTLY_{quantization.upper()}"]
