"""Tokenizers assembled from a vocabulary: byte-level BPE with its pre-tokenizer, and SentencePiece BPE from scores."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxprune.models._safetensors import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types of SentencePiece and GGUF

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# `tokenizer.ggml.pre` -> the expressions that text is split by, one after the other
SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    **dict.fromkeys(("gpt-2", "mpt", "olmo"), (GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), (r"\p{N}", GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"), (LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), (QWEN2,)),
    "tekken": (TEKKEN,),
}
WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")  # a word of the vocabulary is one token; BOS by default


class Vocabulary(NamedTuple):
    """What a tokenizer is made of.

    Attributes:
      kind: `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE).
      pre: key of `SPLITS`, for `gpt2`.
      tokens: by id.
      types: of each token, as SentencePiece numbers them.
      scores: of each token, for `llama`.
      merges: best first, for `gpt2`.
      special: bos, eos, unk, pad -> id, as far as there are any.
      add_bos, add_eos: put around every encoded text.
      space_prefix: a space goes before the text, for `llama`.
      chat_template: in Jinja, or None.
    """

    kind: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    space_prefix: bool
    chat_template: str | None


def from_gguf(path: Path, metadata: dict[str, Any]) -> Vocabulary:
    """The vocabulary in the metadata of a GGUF file."""

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    kind, pre, tokens = get("model"), get("pre", "default"), get("tokens")
    if kind not in ("gpt2", "llama") or not tokens:
        raise ValueError(
            f"{path}: tokenizer model {kind!r} is not supported; supported are gpt2 (BPE) and llama (SentencePiece)"
        )
    if kind == "gpt2" and pre not in SPLITS:
        raise ValueError(f"{path}: pre-tokenizer {pre!r} is not supported; supported are {', '.join(SPLITS)}")
    keys = dict(bos="bos_token_id", eos="eos_token_id", unk="unknown_token_id", pad="padding_token_id")
    return Vocabulary(
        kind=kind,
        pre=pre,
        tokens=tokens,
        types=get("token_type", [1] * len(tokens)),
        scores=get("scores", []),
        merges=get("merges", []),
        special={name: get(key) for name, key in keys.items() if get(key) is not None},
        add_bos=get("add_bos_token", kind == "llama" or pre in WHOLE_WORDS),
        add_eos=get("add_eos_token", False),
        space_prefix=get("add_space_prefix", kind == "llama"),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def from_sentencepiece(folder: Path) -> Vocabulary:
    """The vocabulary in `tokenizer.model`, with what `tokenizer_config.json` beside it says."""
    from google.protobuf.message import DecodeError
    from transformers.utils import sentencepiece_model_pb2_new as protocol

    model: Any = vars(protocol)["ModelProto"]()
    try:
        model.ParseFromString((folder / "tokenizer.model").read_bytes())
    except DecodeError as e:
        raise ValueError(f"{folder}/tokenizer.model: not a SentencePiece model ({e}); copy or download it again") from None
    trainer = model.trainer_spec
    if trainer.model_type != trainer.BPE:
        raise ValueError(f"{folder}/tokenizer.model: a SentencePiece model of type {trainer.model_type}; supported is BPE (2)")
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    ids = dict(bos=trainer.bos_id, eos=trainer.eos_id, unk=trainer.unk_id, pad=trainer.pad_id)
    return Vocabulary(
        kind="llama",
        pre="default",
        tokens=[piece.piece for piece in model.pieces],
        types=[piece.type for piece in model.pieces],
        scores=[piece.score for piece in model.pieces],
        merges=[],
        special={name: i for name, i in ids.items() if i >= 0},
        add_bos=settings.get("add_bos_token", True),
        add_eos=settings.get("add_eos_token", False),
        space_prefix=model.normalizer_spec.add_dummy_prefix,
        chat_template=settings.get("chat_template"),
    )


def assemble(v: Vocabulary) -> "PreTrainedTokenizerFast":
    """The tokenizer of a vocabulary.

    `llama` follows SentencePiece: every run of text between special tokens starts with a space, also if it has one already.
    `gpt2` follows llama.cpp's expressions; transformers 5.23 splits `smollm` without its rule that each digit stands alone.
    """
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = _sentencepiece(v) if v.kind == "llama" else _byte_level(v)
    added = [(t, kind == CONTROL) for t, kind in zip(v.tokens, v.types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(t, special=special, normalized=False) for t, special in added])
    special = {name: v.tokens[i] for name, i in v.special.items()}
    first = [special["bos"]] if v.add_bos and "bos" in special else []
    last = [special["eos"]] if v.add_eos and "eos" in special else []
    if first or last:
        one, two = ([*first, f"$A:{i}", *last] for i in (0, 0))
        pair = [*one, *(t.replace("$A:0", "$B:1") for t in two)]
        used = [(t, tokenizer.token_to_id(t)) for t in {*first, *last}]
        tokenizer.post_processor = processors.TemplateProcessing(single=one, pair=pair, special_tokens=used)
    names = {f"{name}_token": token for name, token in special.items()}
    out = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
    out.chat_template = v.chat_template
    return out


def _byte_level(v: Vocabulary) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab = {token: i for i, token in enumerate(v.tokens)}
    merges = [(left, right) for left, right in (merge.split(" ") for merge in v.merges)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=v.pre in WHOLE_WORDS))
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in SPLITS[v.pre]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if SPLITS[v.pre] == (QWEN2,):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(v: Vocabulary) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: i for i, token in enumerate(v.tokens)}
    plain = {token for token, kind in zip(v.tokens, v.types, strict=True) if kind not in (UNKNOWN, CONTROL, USER_DEFINED, BYTE)}
    merges = []
    for token in plain:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in plain and right in plain:
                merges.append((-v.scores[vocab[token]], vocab[token], vocab[left], (left, right)))
    pairs = [pair for *_, pair in sorted(merges)]
    unknown = v.tokens[v.special["unk"]] if "unk" in v.special else None
    bpe = models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in v.types)
    tokenizer = Tokenizer(bpe)
    space = [normalizers.Prepend("▁")] if v.space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", left=1)] if v.space_prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return tokenizer
