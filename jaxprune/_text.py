"""Text sources: from what a user names on the command line to a stream of text."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprune._decode import check_file, decoded
from jaxprune._records import hub_parts, read_records, text_field

KINDS = "a text file, FILE.jsonl:FIELD, hub:NAME[:CONFIG[:SPLIT[:FIELD]]], builtin or builtin-heldout"


class Text(NamedTuple):
    """A stream of text.

    Attributes:
      source: what the user named.
      pieces: the text in order: documents, or parts of one file.
      separator: what stands between two pieces: nothing inside a file, a blank line between documents.
    """

    source: str
    pieces: Iterable[str]
    separator: str


def read_text(source: str) -> Text:
    r"""Opens a text source; its pieces are read when they are asked for.

    Args:
      source: a text file (UTF-8), `FILE.jsonl:FIELD` (one JSON object a line), `hub:NAME[:CONFIG[:SPLIT[:FIELD]]]` (a dataset
        of the Hugging Face hub, streamed; without CONFIG its default one, SPLIT is `train` and FIELD `text` unless given) or
        `builtin` or `builtin-heldout` (`pydoc_data.topics` of the running Python, sorted by topic: every seventh topic is held
        out for evaluation, `builtin` is the others; each Python version ships its own text).

    Raises:
      FileNotFoundError, IsADirectoryError: there is no such file, or it is a folder.
      ValueError: the source is malformed, or, while the pieces are read: bytes that are not UTF-8, lines that are not JSON
        objects, a missing field, a dataset that cannot be reached.

    >>> text = read_text("builtin")
    >>> "assert" in next(iter(text.pieces)), text.separator
    (True, '\n\n')
    """
    if source in ("builtin", "builtin-heldout"):
        return Text(source, _builtin(heldout=source != "builtin"), "\n\n")
    if source.startswith("hub:"):
        return Text(source, _field(source, hub_parts(source)[-1]), "\n\n")
    path, _, field = source.rpartition(":")
    if path.endswith(".jsonl") and not Path(source).exists():
        check_file(path, KINDS)
        if not field:
            raise ValueError(f"{source}: the name of the field is missing; write {path}:FIELD, e.g. {path}:text")
        return Text(source, _field(path, field), "\n\n")
    file = check_file(source, KINDS)
    if file.suffix == ".jsonl":
        raise ValueError(f"{source}: which field holds the text? Write {source}:FIELD, e.g. {source}:text")
    return Text(source, decoded(file), "")


def _builtin(heldout: bool) -> Iterator[str]:
    from pydoc_data.topics import topics

    return (topics[name] for i, name in enumerate(sorted(topics)) if (i % 7 == 6) == heldout)


def _field(source: str, field: str) -> Iterator[str]:
    return (text_field(where, record, field) for where, record in read_records(source))


def beginnings(text: Text, limit: int) -> Iterator[list[str]]:
    """Yields ever longer beginnings of the text, in whole pieces: `limit` characters or more, then twice as many, to the end.

    Args:
      text: what to read.
      limit: characters of the first beginning.

    Raises:
      ValueError: there is no text at all, or what reading the source raises.
    """
    taken, characters = [], 0
    for piece in text.pieces:
        taken.append(piece)
        characters += len(piece)
        if characters >= limit:
            yield taken
            while characters >= limit:
                limit *= 2
    if not any(piece.strip() for piece in taken):
        raise ValueError(f"{text.source}: there is no text in it; give {KINDS}")
    yield taken


def sha256(text: str) -> str:
    """SHA-256 of a text in UTF-8: for a file that is read to its end, the SHA-256 of the file.

    >>> sha256("abc")[:12]
    'ba7816bf8f01'
    """
    return hashlib.sha256(text.encode()).hexdigest()


def tokenise(tokenizer: Any, text: str) -> np.ndarray:
    """The tokens of a text as int32[t], without special tokens."""
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)
