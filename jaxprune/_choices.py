"""Multiple choice: which continuation of a query the model finds most likely."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune._log_likelihoods import log_likelihoods
from jaxprune._losses import Progress
from jaxprune.models import LlamaConfig, Params

SEPARATOR = "\nAnswer: "


def load_choices(path: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Reads questions from a file of JSON lines: `query`, `choices` (at least two texts) and `gold` (index from 0).

    Args:
      path: the file, UTF-8. Blank lines are skipped.
      limit: read only so many questions from its beginning, or None.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is not such a question, or there is none.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: {limit} given; it must be at least 1")
    items: list[dict[str, Any]] = []
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(items) == limit:
                    break
                if line.strip():
                    items.append(_question(line, f"{path}, line {number}"))
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: byte {e.start} is not UTF-8; convert the file to UTF-8") from None
    if not items:
        raise ValueError(f"{path}: no questions in it; one JSON object a line with query, choices and gold is needed")
    return items


def _question(line: str, where: str) -> dict[str, Any]:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as e:
        raise ValueError(f"{where}: not JSON ({e.msg} at column {e.colno}); one object a line is needed") from None
    missing = [k for k in ("query", "choices", "gold") if not isinstance(item, dict) or k not in item]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing; an object with query, choices and gold is needed")
    query, choices, gold = item["query"], item["choices"], item["gold"]
    if not isinstance(query, str):
        raise ValueError(f"{where}: query is {query!r}; a text is needed")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError(f"{where}: choices are {choices!r}; a list of at least two texts that are not empty is needed")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise ValueError(f"{where}: gold is {gold!r}; an index from 0 to {len(choices) - 1} is needed")
    return dict(query=query, choices=choices, gold=gold)


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a context and of its continuation, without special tokens.

    White space at the end of the context goes to the continuation. Both are encoded as one text; what follows as many tokens as
    the context alone has is the continuation.

    Raises:
      ValueError: the context has no tokens.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = tokenizer.encode(context + continuation, add_special_tokens=False)
    n = len(tokenizer.encode(context, add_special_tokens=False))
    if not n:
        raise ValueError(f"query: {context!r} has no tokens; a text that the choices follow is needed")
    return whole[:n], whole[n:]


def multiple_choice(
    params: Params,
    cfg: LlamaConfig,
    tokenizer: Any,
    items: list[dict[str, Any]],
    *,
    limit: int | None = None,
    separator: str = SEPARATOR,
    batch: int | None = None,
    progress: Progress | None = None,
) -> dict[str, float | int]:
    r"""Accuracy of the choice with the highest log-likelihood after the query.

    The text is `query.rstrip() + separator + choice`; the choice counts with the white space before it. No BOS is added. Texts
    of which the model would read more than `cfg.max_positions` tokens lose their beginning. Ties go to the first choice.

    Args:
      params, cfg: the model.
      tokenizer: of transformers.
      items: questions as `load_choices` returns them.
      limit: use only so many of them, or None.
      separator: between query and choice. The default suits queries like "Question: Why?".
      batch: most texts at a time, or None for as many as make 4096 tokens.
      progress: see `evaluate`.

    Returns:
      `accuracy`: by the sum of the log-likelihoods of the choice's tokens. `accuracy_normalised`: by that sum over the number
      of characters of the choice. `items`: questions asked.

    Raises:
      ValueError: there are no questions, or one has no tokens.

    Reference: `acc` and `acc_norm` of Gao et al., `Language Model Evaluation Harness
    <https://doi.org/10.5281/zenodo.10256836>`_, 2023, whose tokenisation this follows.
    """
    items = items[:limit]
    if not items:
        raise ValueError("items: no questions given; at least one is needed")
    pairs = [encode_pair(tokenizer, i["query"].rstrip() + separator, choice) for i in items for choice in i["choices"]]
    scores = np.zeros(len(pairs))
    found = log_likelihoods(
        params, cfg, pairs, max_length=cfg.max_positions, batch=batch, progress=progress, what="choices"
    )  # fmt: skip
    for i, score, _ in found:
        scores[i] = score
    right, right_normalised, at = 0, 0, 0
    for item in items:
        mine = scores[at : at + len(item["choices"])]
        at += len(mine)
        right += int(np.argmax(mine)) == item["gold"]
        right_normalised += int(np.argmax(mine / [len(c) for c in item["choices"]])) == item["gold"]
    return dict(accuracy=right / len(items), accuracy_normalised=right_normalised / len(items), items=len(items))
