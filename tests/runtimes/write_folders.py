"""Writes folders of Mamba and of all three profiles for transformers, and what our own models compute with them, as a process.

The library needs transformers 5; the folders are then read by that one or by another.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import models
from jaxprune.models import LayerDims, LlamaConfig, MambaConfig, MambaDims
from jaxprune.models.export import hf, hf_custom, hf_padded

A, B, GONE = LayerDims(2, 2, 48), LayerDims(1, 3, 40), LayerDims(0, 0, 0)
MIXED = (B, LayerDims(0, 0, 48), A, GONE, LayerDims(1, 1, 0))
HEADLESS = (LayerDims(0, 0, 40), *MIXED)  # the first layer has no attention, so that no cache begins with it
QKV, ALL = ("q", "k", "v"), ("q", "k", "v", "o", "gate", "up", "down")
FACTORS = dict(short_factor=(1.0, 1.1, 1.2, 1.3), long_factor=(2.0, 2.5, 3.0, 4.0))
ROPES: dict[str, dict[str, Any]] = dict(
    dynamic=dict(factor=2.0),
    yarn=dict(factor=4.0, original_max_position_embeddings=16),
    longrope=dict(original_max_position_embeddings=16, **FACTORS),
    llama3=dict(factor=8.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=16),
)


def config(*layers: LayerDims, d: int = 32, **settings: Any) -> LlamaConfig:
    return LlamaConfig(vocab=300, d=d, head_dim=8, layers=layers, **dict(max_positions=64) | settings)


def rope(kind: str) -> dict[str, Any]:
    """Settings of a model that was trained on shorter sequences than those below."""
    return dict(
        rope_scaling=tuple(sorted((ROPES[kind] | dict(rope_type=kind)).items())), max_positions=16 if kind == "dynamic" else 64
    )


def of_family(family: str, **settings: Any) -> LlamaConfig:
    """What `config.json` of a family with these settings stands for."""
    sizes = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    special = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    cfg = models.from_hf_config(dict(model_type=family) | sizes | heads | special | settings)
    assert isinstance(cfg, LlamaConfig)
    return cfg


CAPS = dict(sliding_window=6, query_pre_attn_scalar=24, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
SLIDING, FULL = "sliding_attention", "full_attention"
PLAIN = dict(
    llama=config(A, A, bos_id=0, eos_ids=(1,), pad_id=2),
    tied=config(A, A, tie_embeddings=True),
    hidden=config(A, A, d=24),
    flap=config(A, A, biases=("o", "down")),
    gone=config(A, GONE, A),
    odd_heads=config(*[LayerDims(3, 1, 40)] * 2, d=32),
    window=config(A, A, family="mistral", sliding_window=6),
    qwen2=config(A, A, family="qwen2", biases=QKV),
    bfloat16=config(A, A),
    qwen3=of_family("qwen3"),
    glm4=of_family("glm4", partial_rotary_factor=0.5),
    gemma=of_family("gemma"),
    gemma2=of_family("gemma2", **CAPS),
    gemma3=of_family("gemma3_text", sliding_window=6, layer_types=[SLIDING, FULL], rope_local_base_freq=50.0),
    **{kind: config(A, **rope(kind)) for kind in ("longrope", "llama3")},
)
PADDED = dict(
    mixed=config(*MIXED),
    tied_biases=config(*MIXED, biases=ALL, tie_embeddings=True),
    flap_odd_heads=config(LayerDims(3, 1, 40), LayerDims(1, 1, 48), biases=("o", "down")),
    window_odd_heads=config(B, LayerDims(0, 0, 40), sliding_window=6),
    qwen2=config(*MIXED, family="qwen2", biases=QKV, d=24),
    llama3=config(*MIXED, **rope("llama3")),
    pairs=config(LayerDims(2, 2, 40, (0, 3)), A),
    bfloat16=config(*MIXED),
)
CUSTOM = dict(
    mixed=config(*MIXED, bos_id=0, eos_ids=(1,), pad_id=2),
    headless=config(*HEADLESS),
    pairs=config(LayerDims(2, 2, 40, (0, 3)), A, LayerDims(1, 1, 48, (2,)), LayerDims(0, 0, 40)),
    tied=config(*MIXED, tie_embeddings=True, d=24),
    biases=config(*HEADLESS, biases=ALL),
    qwen2=config(*MIXED, family="qwen2", biases=QKV),
    window=config(*HEADLESS, family="mistral", sliding_window=6),
    window_biases=config(A, A, sliding_window=6, biases=("o", "down")),
    rotated=config(*HEADLESS, d=24, shortcuts=True, norm_width=32),
    bfloat16=config(*MIXED),
    **{kind: config(LayerDims(0, 0, 40), B, **rope(kind)) for kind in ("dynamic", "yarn", "longrope")},
)
STATES = dict(
    mamba=MambaConfig(vocab=300, d=32, dt_rank=2, state=4, layers=(MambaDims(64),) * 2),
    narrow=MambaConfig(vocab=300, d=32, dt_rank=4, state=4, layers=(MambaDims(40),) * 2),
)
PROFILES = dict(
    hf=(hf.write, PLAIN), hf_padded=(hf_padded.write, PADDED), hf_custom=(hf_custom.write, CUSTOM), states=(models.save, STATES)
)
PAD, LENGTH, NEW = (0, 3), 12, 8  # tokens of padding before each prompt, of it with them, and to generate
GROWING = ("dynamic", "longrope")  # kinds whose rotations depend on how long the sequence is
TEXTS = ("the quick <x>  fox .</s>", " héllo\n\n你好 ", "jumps")


@functools.partial(jax.jit, static_argnames="cfg")
def forward(params: models.Params, tokens: jax.Array, cfg: models.Config) -> jax.Array:
    return models.apply(params, tokens, cfg)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    settings = dict(vocab_size=299, special_tokens=[*special.values()], show_progress=False)
    trainer = trainers.BpeTrainer(**settings, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 8, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, **special, padding_side="left", additional_special_tokens=["<x>"], chat_template="{{ messages }}"
    )


def random(cfg: models.Config, dtype: str) -> models.Params:
    """Parameters without a zero, so that nothing is equal by chance."""
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda x: jnp.asarray(draw(0, 0.3, x.shape), dtype), models.shapes(cfg))


def greedy(params: models.Params, cfg: models.Config, tokens: np.ndarray) -> np.ndarray:
    """The most likely tokens after each prompt, from logits of whole sequences: they start at 0, and no token sees the next."""
    start, rows = LENGTH - np.array(PAD), np.arange(len(tokens))
    sequences = np.stack([np.roll(row, -pad) for row, pad in zip(tokens, PAD, strict=True)])
    for i in range(NEW):
        sequences[rows, start + i] = np.asarray(forward(params, sequences, cfg))[rows, start + i - 1].argmax(-1)
    return np.stack([row[at : at + NEW] for row, at in zip(sequences, start, strict=True)])


def main(out: Path) -> None:
    out.mkdir()
    tokens = np.random.default_rng(1).integers(3, 299, (2, 20), dtype=np.int32)
    prompt = np.where(np.arange(LENGTH) < np.array(PAD)[:, None], 2, tokens[:, :LENGTH]).astype(np.int32)
    arrays = dict(tokens=tokens, prompt=prompt)
    fast = tokenizer()
    for profile, (write, cases) in PROFILES.items():
        for name, cfg in cases.items():
            assert profile in ("hf", "states") or hf.problems(cfg)
            params = random(cfg, "bfloat16" if name == "bfloat16" else "float32")
            write(out / profile / name, params, cfg, fast)
            arrays[f"{profile}/{name}/logits"] = np.asarray(forward(params, tokens, cfg))
            if name not in GROWING:
                arrays[f"{profile}/{name}/greedy"] = greedy(params, cfg, tokens)
    np.savez(out / "ours.npz", **arrays)
    encoded = fast(list(TEXTS), padding=True)
    known = dict(texts=TEXTS, decoded=fast.batch_decode(encoded.input_ids), **encoded)
    (out / "tokenizer.json").write_text(json.dumps(known), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
