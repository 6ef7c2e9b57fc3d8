"""Recovery data: text or instructions as batches that depend on the step alone, so that resuming needs no state."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from jaxprune._instructions import Example, instruction_examples
from jaxprune._records import read_records
from jaxprune._text import beginnings, read_text, sha256, tokenise

Batches: TypeAlias = Callable[[int], dict[str, np.ndarray]]
LIMIT = 2**24


class TrainingData(NamedTuple):
    """Batches and what they are made of.

    Attributes:
      batch: step -> `tokens` int32[b, t] and `weights` float32[b, t], 1 where a token is a target of the loss. In every epoch
        each example is seen once, in an order of its own; a batch may reach into the next epoch.
      kind: `instruction` or `text`.
      examples: examples, or blocks of text, in one epoch.
      dropped: examples left out, because their prompt alone fills the length.
      sha256: of the text that was read, in UTF-8; of prompts and responses joined by blank lines for instructions.
      source: what the user named.
    """

    batch: Batches
    kind: str
    examples: int
    dropped: int
    sha256: str
    source: str


def training_batches(
    source: str, tokenizer: Any, *, length: int, batch_size: int, seed: int, limit: int = LIMIT
) -> TrainingData:
    """Instructions if the records of the source have the fields `instruction` and `output`, otherwise text.

    Instructions come from a `.json` file (a list of objects), a `.jsonl` file or a `hub:` dataset for which no FIELD is given.
    An example is the prompt (see `prompt`), the response and the end-of-text token, cut to `length` and padded on the right
    with weight 0; only tokens of the response have weight 1. Text is joined, tokenised once and cut into blocks of `length`,
    all weights 1.

    Args:
      source: as above, or a text source of `read_text`.
      tokenizer: of the model.
      length: most tokens in a sequence.
      batch_size: sequences in a batch.
      seed: of the order of each epoch.
      limit: characters of text after which no more pieces are read. Instructions are read to their end.

    Raises:
      ValueError: every prompt is too long, the text is shorter than one block, or what reading the source raises.
      OSError: the file cannot be read.
    """
    if length < 2 or batch_size < 1:
        raise ValueError(f"length {length}, batch_size {batch_size}: ask for at least 2 tokens and 1 sequence")
    read = _instructions if _holds_instructions(source) else _text
    kind, examples, dropped, digest = read(source, tokenizer, length, limit)
    return TrainingData(_shuffled(examples, batch_size, seed), kind, len(examples), dropped, digest, source)


def instruction_batches(source: str, tokenizer: Any, *, length: int, batch_size: int, seed: int) -> Batches:
    """The batches of `training_batches` for a source that must hold instructions."""
    examples = _instructions(source, tokenizer, length, LIMIT)[1]
    return _shuffled(examples, batch_size, seed)


def text_batches(source: str, tokenizer: Any, *, length: int, batch_size: int, seed: int, limit: int = LIMIT) -> Batches:
    """The batches of `training_batches` for a source that is read as text."""
    return _shuffled(_text(source, tokenizer, length, limit)[1], batch_size, seed)


def _holds_instructions(source: str) -> bool:
    if source.startswith("hub:"):
        without_field = source.count(":") < 4
    else:
        without_field = source.endswith((".json", ".jsonl"))
    if not without_field:
        return False
    _, record = next(iter(read_records(source)), ("", {}))
    return source.endswith(".json") or {"instruction", "output"} <= set(record)


def _instructions(source: str, tokenizer: Any, length: int, limit: int) -> tuple[str, list[Example], int, str]:
    del limit
    examples, dropped, texts = instruction_examples(read_records(source), tokenizer, length)
    if not examples:
        found = f"all {dropped} prompts have {length} tokens or more; raise length" if dropped else "there are no records in it"
        raise ValueError(f"{source}: {found}")
    return "instruction", examples, dropped, sha256("\n\n".join(texts))


def _text(source: str, tokenizer: Any, length: int, limit: int) -> tuple[str, list[Example], int, str]:
    text = read_text(source)
    joined = text.separator.join(next(beginnings(text, limit)))
    tokens = tokenise(tokenizer, joined)
    if tokens.size < length:
        raise ValueError(f"{source}: the text has {tokens.size} tokens; {length} were asked for; lower length")
    blocks = tokens[: tokens.size // length * length].reshape(-1, length)
    return "text", [Example(block, np.ones(length, np.float32)) for block in blocks], 0, sha256(joined)


def _shuffled(examples: list[Example], batch_size: int, seed: int) -> Batches:
    longest = max(example.tokens.size for example in examples)

    def padded(rows: list[np.ndarray]) -> np.ndarray:
        return np.stack([np.pad(row, (0, longest - row.size)) for row in rows])

    def batch(step: int) -> dict[str, np.ndarray]:
        epochs, places = np.divmod(step * batch_size + np.arange(batch_size), len(examples))
        orders = {e: np.random.default_rng((seed, e)).permutation(len(examples)) for e in np.unique(epochs)}
        chosen = [examples[orders[e][i]] for e, i in zip(epochs, places, strict=True)]
        return dict(tokens=padded([x.tokens for x in chosen]), weights=padded([x.weights for x in chosen]))

    return batch
