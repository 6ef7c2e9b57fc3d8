"""`jaxprune evaluate`: how good a model is, and what it costs."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxprune import _progress, data, folder
from jaxprune import evaluate as evaluation
from jaxprune.commands._common import ModelName, Output, stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure perplexity, multiple-choice accuracy, size, FLOPs and speed.

    Perplexity is the exponential of the mean negative log-likelihood of the predicted tokens, in windows that do not overlap.

    Example: jaxprune evaluate smollm2 --text wikitext2.test.txt --window 1024 128
    """

    model: ModelName
    text: Annotated[str | None, tyro.conf.arg(metavar="SRC")] = None
    """A text file, FILE.jsonl:FIELD, hub:NAME[:CONFIG[:SPLIT[:FIELD]]], builtin or builtin-heldout."""
    window: Annotated[tuple[int, ...], tyro.conf.arg(metavar="T [T ...]")] = (1024,)
    """Tokens in a window; several may be given."""
    max_tokens: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Read at most this many tokens of the text."""
    choice: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Multiple-choice questions: .jsonl with query, choices and gold."""
    limit: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Read at most this many questions."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the weights; default: as stored."""
    output: Output = Output()


def run(args: Evaluate) -> dict[str, Any]:
    """Loads the model and measures."""
    if not args.window:
        raise ValueError("window: none given; give at least one number of tokens, e.g. 1024")
    choices = None if args.choice is None else evaluation.load_choices(args.choice, args.limit)
    text = None if args.text is None else "".join(_joined(data.read_text(args.text)))
    with stage("loading", {}):
        model = folder.load(args.model, args.dtype)
    result: dict[str, Any] = dict(
        evaluation.evaluate(
            model.params,
            model.cfg,
            model.tokenizer,
            text=text,
            window=args.window[0],
            max_tokens=args.max_tokens,
            choices=choices,
            progress=_progress.progress,
        )
    )
    if text is not None:
        tokens = evaluation.encode_text(model.tokenizer, text)[: args.max_tokens]
        for window in args.window[1:]:
            more = evaluation.perplexity(model.params, model.cfg, tokens, window=window, progress=_progress.progress)
            result[f"perplexity_at_{window}"] = more["perplexity"]
    return result


def _joined(text: data.Text):
    for i, piece in enumerate(text.pieces):
        yield text.separator + piece if i else piece
