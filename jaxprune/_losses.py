"""Token losses of many sequences, one compilation a shape."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxprune._beside import shares, spread
from jaxprune.models import Config, Params, hidden, token_losses
from jaxprune.models._mesh import on_host

Progress = Callable[[Sequence[Any], str], Iterable[Any]]
BATCH_TOKENS = 4096  # tokens that go through the model at a time


@functools.partial(jax.jit, static_argnames="cfg")
def token_losses_of(params, tokens, cfg):
    """Cross-entropy of tokens 1, 2, ... of each row, float32[b, t - 1]."""
    return token_losses(params, hidden(params, tokens[:, :-1], cfg), tokens[:, 1:], cfg)


def losses(
    params: Params, cfg: Config, rows: np.ndarray, batch: int | None, progress: Progress | None, what: str
) -> Iterator[np.ndarray]:
    """Yields the cross-entropy of tokens 1, 2, ... of each row, float32[t - 1] in nats, in order.

    Args:
      params, cfg: the model.
      rows: int32[n, t].
      batch: most rows at a time, or None for as many as make 4096 tokens on each part of a mesh. Batches are of equal size; the
        last is filled up.
      progress: wraps the sequence of batches; called with it and a description.
      what: the description.
    """
    n, t = rows.shape
    parts = shares(params)
    batch = max(1, BATCH_TOKENS // t) * parts if batch is None else batch
    if batch < 1:
        raise ValueError(f"batch: {batch} given; it must be at least 1")
    size = -(-n // -(-n // batch) // parts) * parts
    batches = [rows[i : i + size] for i in range(0, n, size)]
    for real in batches if progress is None else progress(batches, what):
        full = np.concatenate([real, np.zeros((size - len(real), t), real.dtype)])
        yield from on_host(token_losses_of(params, spread(params, full), cfg))[: len(real)]
