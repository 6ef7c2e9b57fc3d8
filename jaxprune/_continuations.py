"""Continuations of many prompts, until a text or a token stops them."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxprune._log_likelihoods import equal_batches, padded
from jaxprune._losses import Progress
from jaxprune.models import LlamaConfig, Params, decode


def continuations(
    params: Params,
    cfg: LlamaConfig,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    until: Sequence[str],
    eos_ids: Sequence[int],
    max_new_tokens: int,
    max_length: int,
    temperature: float = 0.0,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[int, str]]:
    """Yields what follows each prompt, longest prompts first. A prompt's greedy continuation is the same in every batch.

    Args:
      params, cfg: the model.
      tokenizer: of transformers.
      prompts: token ids. Batches are padded on the left to one of a few lengths.
      until: texts that end a continuation; they and what follows are left out.
      eos_ids: tokens that do the same.
      max_new_tokens: the most tokens that a prompt gets.
      max_length: tokens that there is room for; prompts lose their beginning where they leave less than `max_new_tokens` of it.
      temperature: 0 takes the most likely token; more draws, with the number of the batch as the seed.
      batch: most prompts at a time, or None for as many as make 4096 tokens with what they get.
      progress: wraps the sequence of batches; called with it and a description.

    Yields:
      The index of the prompt and its continuation.

    Raises:
      ValueError: `max_new_tokens` leaves no room for a prompt, or as `decode.stream`.
    """
    room = max_length - max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_new_tokens: {max_new_tokens} given, the model has room for {max_length} tokens; "
            f"ask for at most {max_length - 1}"
        )
    batches = equal_batches([min(padded(len(p)), room) for p in prompts], batch, max_new_tokens)
    for number, (length, size, where) in enumerate(batches if progress is None else progress(batches, "continuations")):
        rows, pad = np.zeros((size, length), np.int32), np.full(size, length - 1)
        for j, i in enumerate(where):
            tokens = prompts[i][-length:]
            pad[j] = length - len(tokens)
            rows[j, pad[j] :] = tokens
        stream = decode.stream(
            params, cfg, rows, max_new_tokens=max_new_tokens, temperature=temperature, key=jax.random.key(number),
            eos_ids=eos_ids, pad=pad.tolist(),
        )  # fmt: skip
        for i, tokens in zip(where, _until(stream, len(where), tokenizer, until, eos_ids), strict=True):
            yield i, _cut(tokenizer.decode(tokens, skip_special_tokens=True), until)


def _until(stream, n, tokenizer, until, eos_ids) -> list[list[int]]:
    """The tokens of the first n sequences, each up to where it stopped."""
    written: list[list[int]] = [[] for _ in range(n)]
    going = set(range(n))
    for step in stream:
        for i in sorted(going):
            if step[i] in eos_ids:
                going.remove(i)
                continue
            written[i].append(int(step[i]))
            if until and any(stop in tokenizer.decode(written[i], skip_special_tokens=False) for stop in until):
                going.remove(i)
        if not going:
            break
    return written


def _cut(text: str, until: Sequence[str]) -> str:
    for stop in until:
        text = text.split(stop)[0]
    return text
