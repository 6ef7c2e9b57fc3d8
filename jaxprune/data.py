"""Calibration data: from a source that the user names to blocks of tokens, the same ones each time."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxprune._instructions import prompt
from jaxprune._self_blocks import self_blocks
from jaxprune._text import Text, beginnings, read_text, sha256, tokenise
from jaxprune._token_file import is_token_file, read_token_file
from jaxprune._training_data import TrainingData, instruction_batches, text_batches, training_batches

__all__ = [
    "Calibration", "Text", "TrainingData", "check_sha256", "instruction_batches",
    "is_token_file", "prompt", "read_text", "read_token_file", "self_blocks", "text_batches",
    "token_blocks", "training_batches",
]  # fmt: skip


class Calibration(NamedTuple):
    """Blocks of tokens and where they come from.

    Attributes:
      tokens: the blocks, one a row.
      sha256: of the text that the blocks were drawn from, in UTF-8; of a file of token ids; else of the int32 tokens.
      source: what the user named.
      available: tokens that the blocks were drawn from.
    """

    tokens: Int[np.ndarray, "samples length"]
    sha256: str
    source: str
    available: int


def token_blocks(
    source: str | Iterable[Any],
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int,
    windows: str = "stream",
    or_fewer: bool = False,
    sampler: Callable[[int, int, int], Any] | None = None,
) -> Calibration:
    """Draws blocks of tokens from a source; the result depends on the text and the arguments alone.

    With `windows="stream"` the pieces of the text are joined (documents by a blank line), tokenised once without special
    tokens, and all placements of `samples` windows that do not overlap are equally likely. With `"documents"` each block is a
    window at a random place of a random document that has `length` tokens or more, at most one from each. Of a long text only
    the beginning is read: 2^21 characters, or 32 for each token asked for if that is more, and twice as many while they are
    too few. Of a file of token ids each block is the beginning of a random row, at most one of each.

    Args:
      source: as in `read_text` or `read_token_file`; or `self`, drawn from `sampler`; or an iterable of token arrays [t] or
        [b, t] with t at least `length`, whose first `samples` rows are cut to `length`.
      tokenizer: of the model; unused where there is no text.
      samples: blocks.
      length: tokens in a block.
      seed: of the places that the windows are taken from.
      windows: `stream` or `documents`, of a text.
      or_fewer: of a text that is too short for so many windows of the stream, or a file with fewer rows, take as many as it
        has, at least one.
      sampler: (samples, length, seed) -> tokens, for the source `self`; see `self_blocks`.

    Raises:
      ValueError: fewer tokens than asked for, a bad argument, or what reading the source raises.

    Reference:
      `documents` is the calibration of Ma et al., `LLM-Pruner <https://arxiv.org/abs/2305.11627>`_, 2023, section 4.1, whose
      code draws documents with replacement.
    """
    if samples < 1 or length < 2:
        raise ValueError(f"samples {samples}, length {length}: ask for at least 1 block of 2 tokens")
    if windows not in ("stream", "documents"):
        raise ValueError(f"windows: {windows!r} given; allowed are 'stream' and 'documents'")
    if not isinstance(source, str):
        return _from_arrays("iterator", source, samples, length)
    if source == "self":
        if sampler is None:
            raise ValueError("self: needs a sampler, a function that draws tokens from the model; see self_blocks")
        return _from_arrays(source, [sampler(samples, length, seed)], samples, length)
    if is_token_file(source):
        return _rows(source, samples, length, seed, or_fewer)
    draw = _stream_windows if windows == "stream" else _document_windows
    text, rng = read_text(source), np.random.default_rng(seed)
    for pieces in beginnings(text, max(2**21, 32 * samples * length)):
        blocks, available, found = draw(text, pieces, tokenizer, samples, length, rng)
        if blocks is not None:
            return Calibration(blocks, sha256(text.separator.join(pieces)), source, available)
    if or_fewer and windows == "stream" and available >= length:
        blocks, available, _ = draw(text, pieces, tokenizer, available // length, length, rng)
        return Calibration(blocks, sha256(text.separator.join(pieces)), source, available)
    raise ValueError(f"{source}: {found}; {samples} x {length} = {samples * length} were asked for; lower samples or length")


def _stream_windows(text: Text, pieces: list[str], tokenizer: Any, samples: int, length: int, rng: np.random.Generator):
    stream = tokenise(tokenizer, text.separator.join(pieces))
    spare = stream.size - samples * length
    if spare < 0:
        return None, stream.size, f"the text has {stream.size} tokens"
    gaps = np.sort(rng.choice(spare + samples, samples, replace=False)) - np.arange(samples)
    starts = rng.permutation(gaps + length * np.arange(samples))
    return stream[starts[:, None] + np.arange(length)], stream.size, ""


def _document_windows(text: Text, pieces: list[str], tokenizer: Any, samples: int, length: int, rng: np.random.Generator):
    if not text.separator:
        raise ValueError(f"{text.source}: is one text without documents; use windows 'stream' or give FILE.jsonl:FIELD")
    blocks, available = [], 0
    for i in rng.permutation(len(pieces)):
        tokens = tokenise(tokenizer, pieces[i])
        available += tokens.size
        if tokens.size >= length:
            start = rng.integers(tokens.size - length + 1)
            blocks.append(tokens[start : start + length])
        if len(blocks) == samples:
            return np.stack(blocks), available, ""
    return None, available, f"{len(blocks)} of {len(pieces)} documents have {length} tokens or more"


def _rows(source: str, samples: int, length: int, seed: int, or_fewer: bool) -> Calibration:
    rows = read_token_file(source)
    n, t = rows.shape
    if length > t:
        raise ValueError(f"{source}: its rows have {t} tokens; {length} were asked for; lower length")
    if samples > n and not or_fewer:
        raise ValueError(f"{source}: it has {n} rows; {samples} were asked for; lower samples")
    chosen = np.random.default_rng(seed).permutation(n)[:samples]
    with open(source, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Calibration(rows[chosen, :length].astype(np.int32), digest, source, rows.size)


def _from_arrays(source: str, arrays: Iterable[Any], samples: int, length: int) -> Calibration:
    rows: list[np.ndarray] = []
    for array in arrays:
        array = np.asarray(array)
        if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.integer) or array.shape[-1] < length:
            given = f"{array.dtype}{list(array.shape)}"
            raise ValueError(f"{source}: an array {given} given; integers [t] or [b, t] with t >= {length} are needed")
        rows.extend(np.atleast_2d(array)[:, :length])
        if len(rows) >= samples:
            tokens = np.stack(rows[:samples]).astype(np.int32)
            return Calibration(tokens, hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest(), source, tokens.size)
    raise ValueError(f"{source}: {len(rows)} blocks of {length} tokens found; {samples} were asked for; lower samples")


def check_sha256(recorded: str, actual: str, source: str = "calibration text") -> None:
    """Compares the text that a plan was made on with the text at hand.

    Raises:
      ValueError: they differ.
    """
    if recorded != actual:
        raise ValueError(f"{source}: SHA-256 {actual} given, {recorded} recorded; use the recorded text or make a new plan")
