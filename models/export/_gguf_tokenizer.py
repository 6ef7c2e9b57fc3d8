"""What a GGUF file says of a tokenizer, read off a fast one of transformers: the inverse of `_gguf_tokenizer.assemble`."""

import json
import re
from typing import Any

from jaxprune.models._gguf_tokenizer import (
    BYTE,
    CONTROL,
    GPT2,
    NORMAL,
    QWEN2,
    SPLITS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WHOLE_WORDS,
    Vocabulary,
)
from jaxprune.models.config import LlamaConfig


def vocabulary(tokenizer: Any, cfg: LlamaConfig) -> Vocabulary:
    """The vocabulary of a fast tokenizer, as long as the embedding: rows without a token are called `[PAD7]` and unused.

    Special tokens that the tokenizer does not name are those of the configuration.

    Raises:
      ValueError: not a fast tokenizer, of a kind that llama.cpp cannot be told, or with more tokens than the model.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(f"tokenizer {type(tokenizer).__name__} given; it must be a fast tokenizer of transformers, or None")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise ValueError(f"tokenizer model {model['type']!r} given; GGUF files of these architectures can hold BPE")
    kind = "llama" if model.get("byte_fallback") or _space_prefix(state) is not None else "gpt2"
    tokens, types = _tokens(tokenizer, model, state["added_tokens"], cfg.vocab)
    special = _special(tokenizer, cfg)
    first, last = _around(tokenizer, special)
    template = tokenizer.chat_template
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    return Vocabulary(
        kind=kind,
        pre=_pre(state) if kind == "gpt2" else "default",
        tokens=tokens,
        types=types,
        scores=_scores(tokens, merges) if kind == "llama" else [],
        merges=[" ".join(m) for m in merges] if kind == "gpt2" else [],
        special=special,
        add_bos=first,
        add_eos=last,
        space_prefix=bool(_space_prefix(state)),
        chat_template=template.get("default") if isinstance(template, dict) else template,
    )


def _tokens(tokenizer: Any, model: dict, added: list[dict], size: int) -> tuple[list[str], list[int]]:
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    if max(by_id) >= size:
        raise ValueError(f"the tokenizer has ids up to {max(by_id)}, the model {size} rows; give the tokenizer of this model")
    kinds = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in added}
    if model.get("byte_fallback"):
        kinds |= {i: BYTE for i, token in by_id.items() if re.fullmatch("<0x[0-9A-F]{2}>", token)}
        kinds |= {i: UNKNOWN for i, token in by_id.items() if token == model.get("unk_token")}
    types = [kinds.get(i, NORMAL) if i in by_id else UNUSED for i in range(size)]
    return [by_id.get(i, f"[PAD{i}]") for i in range(size)], types


def _special(tokenizer: Any, cfg: LlamaConfig) -> dict[str, int]:
    eos = cfg.eos_ids[0] if cfg.eos_ids else None
    own = dict(bos=cfg.bos_id, eos=eos, unk=None, pad=cfg.pad_id)
    named = {name: getattr(tokenizer, f"{name}_token_id") for name in own}
    found = {name: i for name in own for i in [named[name] if named[name] is not None else own[name]] if i is not None}
    if "eos" not in found:
        raise ValueError(
            "neither the tokenizer nor the configuration names the token that ends a text, and llama.cpp would take some other "
            "for it; set tokenizer.eos_token"
        )
    return found


def _around(tokenizer: Any, special: dict[str, int]) -> tuple[bool, bool]:
    """Are bos and eos put around every text?"""
    ids = list(tokenizer("").input_ids)
    for first in (False, True):
        for last in (False, True):
            if ids == [special.get("bos")] * first + [special["eos"]] * last:
                return first, last
    raise ValueError(f"the tokenizer puts the tokens {ids} around a text; GGUF can say bos before it and eos after it")


def _pre(state: dict) -> str:
    expressions = _expressions(state["pre_tokenizer"])
    whole_words, forms = bool(state["model"].get("ignore_merges")), _steps(state["normalizer"], "normalizers")
    if forms not in ([], [dict(type="NFC")]) or (forms and expressions != (QWEN2,)):
        raise ValueError(
            f"the tokenizer normalises text by {[f['type'] for f in forms]}; llama.cpp does not, for these expressions"
        )
    for name, splits in SPLITS.items():
        if splits == expressions and (name in WHOLE_WORDS) == whole_words:
            return name
    raise ValueError(
        f"the tokenizer splits text by {expressions}{' and takes whole words' * whole_words}, which is none of the pre-"
        f"tokenizers of llama.cpp that are known here ({', '.join(SPLITS)}); export without one (None) and feed token ids"
    )


def _expressions(pre_tokenizer: dict | None) -> tuple[str, ...]:
    out: list[str] = []
    for step in _steps(pre_tokenizer, "pretokenizers"):
        kind, expression = step["type"], step.get("pattern", {}).get("Regex")
        if kind == "Split" and expression and step["behavior"] == "Isolated" and not step["invert"]:
            out.append(expression)
        elif kind == "Digits" and step["individual_digits"]:
            out.append(r"\p{N}")
        elif kind == "ByteLevel" and not step["add_prefix_space"]:
            out += [GPT2] if step["use_regex"] else []
        else:
            raise ValueError(f"the tokenizer splits text by {json.dumps(step)}; llama.cpp has no such step")
    return tuple(out)


def _space_prefix(state: dict) -> bool | None:
    """Does a space go before the text, where spaces become U+2581? None if they do not become that."""
    steps = [*_steps(state["normalizer"], "normalizers"), *_steps(state["pre_tokenizer"], "pretokenizers")]
    replaced = any(s["type"] == "Metaspace" or (s["type"] == "Replace" and s["content"] == "▁") for s in steps)
    if not replaced:
        return None
    return any(s == dict(type="Prepend", prepend="▁") or s.get("prepend_scheme") in ("always", "first") for s in steps)


def _steps(part: dict | None, key: str) -> list[dict]:
    if part is None:
        return []
    return part[key] if part["type"] == "Sequence" else [part]


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """SentencePiece joins the pair with the best score first: minus the rank among tokens by their first merge."""
    ranks = {token: float(-i) for i, token in enumerate(dict.fromkeys("".join(merge) for merge in merges))}
    return [ranks.get(token, -float(len(ranks))) for token in tokens]
