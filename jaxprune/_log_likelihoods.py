"""Log-likelihoods of continuations: one compilation a length, longest texts first."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._losses import BATCH_TOKENS, Progress
from jaxprune.models import LlamaConfig, Params, head, hidden
from jaxprune.models._mesh import on_host

CHUNK = 256  # tokens whose logits are in memory at a time


def log_likelihoods(
    params: Params,
    cfg: LlamaConfig,
    pairs: Sequence[tuple[list[int], list[int]]],
    *,
    max_length: int,
    batch: int | None = None,
    progress: Progress | None = None,
    what: str = "log-likelihoods",
) -> Iterator[tuple[int, float, bool]]:
    r"""Yields :math:`\sum_t \log p(y_t \mid x, y_{<t})` of each continuation y after its context x, longest texts first.

    Args:
      params, cfg: the model.
      pairs: token ids of contexts and of their continuations.
      max_length: tokens that the model reads at most. It does not read the last token of a text, so texts longer than
        `max_length + 1` lose their beginning.
      batch: most texts at a time, or None for as many as make 4096 tokens.
      progress: wraps the sequence of batches; called with it and a description.
      what: the description.

    Yields:
      The index of the pair, the log-likelihood in nats, and whether each of its tokens is the most likely one.

    Raises:
      ValueError: a context or a continuation is empty, a continuation is longer than `max_length`, or a token is not in the
        vocabulary.

    >>> import jax
    >>> from jaxprune import models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> uniform = jax.tree.map(jax.numpy.zeros_like, models.init(jax.random.key(0), cfg))
    >>> found = log_likelihoods(uniform, cfg, [([1], [5, 6])], max_length=9)  # all zeros: every token is as likely
    >>> [(i, round(float(x / np.log(64)), 3), best) for i, x, best in found]
    [(0, -2.0, False)]
    """
    _check(pairs, cfg, max_length)
    texts = [np.asarray((context + continuation)[-max_length - 1 :], np.int32) for context, continuation in pairs]
    batches = equal_batches([min(padded(len(text) - 1), max_length) for text in texts], batch)
    for length, size, where in batches if progress is None else progress(batches, what):
        rows = np.zeros((size, length + 1), np.int32)
        for row, i in zip(rows, where, strict=False):
            row[: len(texts[i])] = texts[i]
        found, best = (on_host(x) for x in _of_tokens(params, rows, cfg))
        for i, mine, hits in zip(where, found, best, strict=False):
            last, n = len(texts[i]) - 1, len(pairs[i][1])
            yield i, float(mine[last - n : last].sum(dtype=np.float64)), bool(hits[last - n : last].all())


def _check(pairs, cfg, max_length):
    for context, continuation in pairs:
        if not context or not continuation:
            raise ValueError(
                f"log-likelihood: context of {len(context)} and continuation of {len(continuation)} tokens given; "
                "both need at least 1"
            )
        if len(continuation) > max_length:
            raise ValueError(
                f"log-likelihood: continuation of {len(continuation)} tokens given, the model reads {max_length}; "
                "raise max_length or shorten it"
            )
        low, high = min(*context, *continuation), max(*context, *continuation)
        if low < 0 or high >= cfg.vocab:
            raise ValueError(f"log-likelihood: token ids {low} to {high} given; the vocabulary is 0 to {cfg.vocab - 1}")


@functools.partial(jax.jit, static_argnames="cfg")
def _of_tokens(params, rows, cfg):
    """Log-probabilities of tokens 1, 2, ... of each row, float32[b, t], and whether no other is more likely, bool[b, t]."""
    x, targets = hidden(params, rows[:, :-1], cfg), rows[:, 1:]

    def one(z):
        logits = head(params, z[0], cfg)
        return logits[z[1]] - jax.nn.logsumexp(logits), jnp.argmax(logits) == z[1]

    found, best = jax.lax.map(one, (x.reshape(-1, x.shape[-1]), targets.reshape(-1)), batch_size=CHUNK)
    return found.reshape(targets.shape), best.reshape(targets.shape)


def equal_batches(lengths: Sequence[int], batch: int | None, extra: int = 0) -> list[tuple[int, int, list[int]]]:
    """Cuts indices into batches of one length each, longest first, and of one size a length, which the last may not fill.

    Args:
      lengths: the length of each item.
      batch: most items at a time, or None for as many as make 4096 tokens.
      extra: tokens that come on top of each.

    Returns:
      Length, size and indices of each batch.

    Raises:
      ValueError: `batch` is less than 1.

    >>> equal_batches([32, 64, 32, 32], 2)
    [(64, 1, [1]), (32, 2, [0, 2]), (32, 2, [3])]
    """
    if batch is not None and batch < 1:
        raise ValueError(f"batch: {batch} given; it must be at least 1")
    out = []
    for length in sorted(set(lengths), reverse=True):
        where = [i for i, n in enumerate(lengths) if n == length]
        most = batch or max(1, BATCH_TOKENS // (length + extra))
        size = -(-len(where) // -(-len(where) // most))
        out += [(length, size, where[i : i + size]) for i in range(0, len(where), size)]
    return out


def padded(n: int) -> int:
    """The least of 32, 48, 64, 96, 128, 192, ... that is at least n: few lengths to compile for, at most a third of padding."""
    power = 1 << max(4, (n - 1).bit_length() - 1)
    return next(length for length in (2 * power, 3 * power, 4 * power) if length >= n) if n > 32 else 32
