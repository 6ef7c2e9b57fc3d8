"""`jaxprune evaluate`: how good a model is, and what it costs."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from jaxprune import _hosts, _progress, data, folder, harness
from jaxprune import evaluate as evaluation
from jaxprune._text import beginnings
from jaxprune.commands import _devices
from jaxprune.commands._common import ModelName, Output, flag, stage
from jaxprune.commands._compute import Compute
from jaxprune.models import checkpoint
from jaxprune.models.mamba_config import only_llama

WINDOW = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure perplexity, multiple-choice accuracy, size, FLOPs and speed.

    Perplexity is the exponential of the mean negative log-likelihood of the predicted tokens, in windows that do not overlap.

    Example: jaxprune evaluate smollm2 --text wikitext2.test.txt --window 1024 128 --tasks arc_easy,piqa
    """

    model: ModelName
    text: Annotated[str | None, flag("SRC", "no perplexity")] = None
    """A text file, FILE.jsonl:FIELD, hub:NAME[:CONFIG[:SPLIT[:FIELD]]], builtin, builtin-heldout or FILE.npy (integers, a
    sequence of token ids in each row; no tokenizer is needed)."""
    window: Annotated[tuple[int, ...] | None, flag("T [T ...]", "1024, or a row of FILE.npy")] = None
    """Tokens in a window; several may be given. Of FILE.npy each row is a window, cut to so many tokens."""
    max_tokens: Annotated[int | None, flag("N", "all")] = None
    """Read at most this many tokens of the text; of FILE.npy in whole rows."""
    choice: Annotated[Path | None, flag("FILE", "none")] = None
    """Multiple-choice questions: .jsonl with query, choices and gold."""
    limit: Annotated[int | None, flag("N", "all")] = None
    """Read at most this many questions, also of each task."""
    tasks: Annotated[str | None, flag("NAME[,NAME...]", "none")] = None
    """Tasks of lm-evaluation-harness (pip install 'jaxprune[eval]'); llm-pruner is the seven of that paper."""
    include_path: Annotated[Path | None, flag("DIR", "none")] = None
    """More tasks, as .yaml files in this folder."""
    num_fewshot: Annotated[int | None, flag("K", "what the task says")] = None
    """Examples in front of each item of a task."""
    dtype: Annotated[Literal["float32", "bfloat16"] | None, flag("{float32,bfloat16}", "as stored")] = None
    """Type of the weights."""
    devices: _devices.Devices = _devices.Devices()
    hosts: _devices.Hosts = _devices.Hosts()
    compute: Compute = Compute()
    output: Output = Output()


def run(args: Evaluate) -> dict[str, Any]:
    """Loads the model and measures."""
    with _hosts.alike():
        text, choices = inputs(args)
    tasks = _tasks(args)
    if choices is not None or tasks is not None:
        with _hosts.alike():
            only_llama(checkpoint.read_config(args.model), "choice and tasks")
    with stage("loading", {}):
        needed = isinstance(text, str) or choices is not None or tasks is not None
        model = _devices.load_any(args.devices, args.model, args.dtype, needs_tokenizer=needed)
    result = measured(model, args, text, choices)
    if tasks is not None:
        result["tasks"] = harness.run_tasks(model, tasks, limit=args.limit, num_fewshot=args.num_fewshot)
    return result


def _tasks(args: Evaluate) -> harness.Tasks | None:
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise ValueError(f"num_fewshot: {args.num_fewshot} given; it must be at least 0")
    if args.tasks is None:
        if args.include_path is not None or args.num_fewshot is not None:
            raise ValueError("include_path and num_fewshot belong to tasks; name some with --tasks")
        return None
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"limit: {args.limit} given; it must be at least 1")
    with stage("finding tasks", {}):
        return harness.load_tasks(args.tasks.split(","), args.include_path)


def measured(
    model: folder.Model, args: Evaluate, text: str | np.ndarray | None, choices: list[dict[str, Any]] | None
) -> dict[str, Any]:
    """The numbers that the flags ask for, of a model that is loaded; `perplexity` is that of the first window."""
    windows = args.window or (WINDOW,)
    if isinstance(text, np.ndarray):
        row = text.shape[1]
        windows = tuple(dict.fromkeys(min(window, row) for window in args.window or (row,)))
    result: dict[str, Any] = dict(
        evaluation.evaluate(
            model.params,
            model.cfg,
            model.tokenizer,
            text=text,
            window=windows[0],
            max_tokens=args.max_tokens,
            choices=choices,
            progress=_progress.progress,
        )
    )
    if text is not None:
        tokens = evaluation.encode(model.tokenizer, text, args.max_tokens)
        for window in windows[1:]:
            more = evaluation.perplexity(model.params, model.cfg, tokens, window=window, progress=_progress.progress)
            result[f"perplexity_at_{window}"] = more["perplexity"]
    return result


def inputs(args: Evaluate) -> tuple[str | np.ndarray | None, list[dict[str, Any]] | None]:
    """The text, or token ids int[b, t], and the questions, before any model is loaded.

    Raises:
      ValueError, OSError: a flag or a file is not what it should be.
    """
    if args.window is not None and min(args.window, default=0) < 2:
        raise ValueError(f"window: {args.window} given; give at least one number of tokens, 2 or more, e.g. 1024")
    longest = max(args.window or (WINDOW,))
    if args.max_tokens is not None and args.max_tokens < longest and not data.is_token_file(args.text):
        raise ValueError(f"max_tokens: {args.max_tokens} given, window {longest} asked; read at least one window")
    choices = None if args.choice is None else evaluation.load_choices(args.choice, args.limit)
    return None if args.text is None else _text(args.text, args.max_tokens), choices


def _text(source: str, max_tokens: int | None) -> str | np.ndarray:
    if data.is_token_file(source):
        return evaluation.encode(None, data.read_token_file(source), max_tokens)
    text = data.read_text(source)
    limit = sys.maxsize if max_tokens is None else 32 * max_tokens  # characters; no text has as many in a token
    return text.separator.join(next(beginnings(text, limit)))
