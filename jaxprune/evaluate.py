"""What a model costs and how good it is: perplexity, multiple choice, sizes, latency."""

import math
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jaxprune._choices import load_choices, multiple_choice
from jaxprune._latency import latency
from jaxprune._losses import Progress, losses
from jaxprune.models import Config, MambaConfig, Params
from jaxprune.models.mamba_config import only_llama

__all__ = [
    "Progress", "encode", "encode_text", "evaluate", "latency", "load_choices", "multiple_choice", "perplexity", "sizes",
]  # fmt: skip


def encode_text(tokenizer: Any, text: str) -> Int[np.ndarray, " n"]:
    """Tokens of a whole text, with a BOS at its start if the tokenizer adds one, and no other special token.

    Args:
      tokenizer: of transformers.
      text: of any length.
    """
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    bos = [tokenizer.bos_token_id]
    adds = tokenizer.encode("a")[:1] == bos != tokenizer.encode("a", add_special_tokens=False)[:1]
    return np.asarray(bos + ids if adds else ids, np.int32)


def encode(
    tokenizer: Any, text: str | Int[np.ndarray, "b t"], max_tokens: int | None = None
) -> Int[np.ndarray, " n"] | Int[np.ndarray, "rows t"]:
    """The tokens that `perplexity` reads: those of a text, or sequences of token ids as they are.

    Args:
      tokenizer: of transformers; not used for token ids.
      text: a text, or token ids.
      max_tokens: only so many tokens from the beginning, of token ids in whole sequences; None is all.

    Raises:
      ValueError: `max_tokens` is less than a sequence of token ids.
    """
    if isinstance(text, str):
        return encode_text(tokenizer, text)[:max_tokens]
    if max_tokens is None:
        return text
    if max_tokens < text.shape[1]:
        raise ValueError(f"max_tokens: {max_tokens} given, a sequence has {text.shape[1]}; read at least one sequence")
    return text[: max_tokens // text.shape[1]]


def perplexity(
    params: Params,
    cfg: Config,
    tokens: Int[np.ndarray, " n"] | Int[np.ndarray, "b t"],
    *,
    window: int = 1024,
    batch: int | None = None,
    progress: Progress | None = None,
) -> dict[str, float | int]:
    """exp of the mean cross-entropy of the predicted tokens, in windows that do not overlap.

    Each window is read on its own, so its first token is not predicted and there are `tokens - tokens / window` predictions.
    Tokens that do not fill a window at the end are dropped. Of sequences [b, t] each is a window, cut to `window` tokens.

    Args:
      params, cfg: the model.
      tokens: of a text, see `encode_text`, or of sequences that belong to themselves, such as images.
      window: tokens that are read together.
      batch: windows at a time, or None for as many as make 4096 tokens.
      progress: see `evaluate`.

    Returns:
      `perplexity`, the `tokens` of the text that the windows cover, and `window`.

    Raises:
      ValueError: the text does not fill one window, the window is shorter than 2, or a token is not in the vocabulary.

    >>> import jax
    >>> import numpy as np
    >>> from jaxprune import evaluate, models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> params = jax.tree.map(jax.numpy.zeros_like, models.init(jax.random.key(0), cfg))
    >>> found = evaluate.perplexity(params, cfg, np.arange(50), window=16)  # all zeros: every token is as likely as another
    >>> round(found["perplexity"], 3), found["tokens"], found["window"]
    (64.0, 48, 16)
    """
    tokens = np.asarray(tokens)
    if window < 2:
        raise ValueError(f"window: {window} given; at least 2 tokens are needed to predict one")
    if tokens.ndim == 2:
        window = min(window, tokens.shape[1])
        tokens = tokens[:, :window].reshape(-1)
    if len(tokens) < window:
        raise ValueError(f"text: {len(tokens)} tokens given, window {window} asked; take a longer text or a shorter window")
    rows = tokens[: len(tokens) // window * window].reshape(-1, window)
    if rows.min() < 0 or rows.max() >= cfg.vocab:
        raise ValueError(f"text: token ids {rows.min()} to {rows.max()} given; the vocabulary is 0 to {cfg.vocab - 1}")
    rows = rows.astype(np.int32)
    nll = [row.mean(dtype=np.float64) for row in losses(params, cfg, rows, batch, progress, f"perplexity at {window}")]
    mean = float(np.mean(nll))
    return dict(perplexity=math.exp(mean) if mean < 700 else math.inf, tokens=rows.size, window=window)


def sizes(params: Params, cfg: Config, *, context: int = 1024) -> dict[str, int]:
    """What a model takes.

    The matrices of the layers and the head count two FLOPs a parameter, scores and weighted values of a layer
    `4 * context * q_heads * head_dim`, convolution and recurrence of a Mamba layer `(2 * conv + 9 * state) * inner`; norms,
    rotations, softmax and other functions of single numbers are left out.

    Args:
      params, cfg: the model; the shapes of its arrays are enough.
      context: keys that the token attends to, for the FLOPs.

    Returns:
      `parameters` that are stored, `decoder_parameters` (attention and MLP matrices), `bytes` of all arrays, `flops_per_token`
      of the forward pass at this `context`, and `context`.

    >>> from jaxprune import evaluate, models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),), tie_embeddings=True)
    >>> evaluate.sizes(models.shapes(cfg), cfg, context=10)
    {'parameters': 9824, 'decoder_parameters': 7680, 'bytes': 39296, 'flops_per_token': 20736, 'context': 10}
    """
    leaves = jax.tree.leaves(params)
    return dict(
        parameters=sum(x.size for x in leaves),
        decoder_parameters=cfg.decoder_parameters,
        bytes=sum(x.size * x.dtype.itemsize for x in leaves),
        flops_per_token=flops_per_token(cfg, context),
        context=context,
    )


def flops_per_token(cfg: Config, context: int) -> int:
    """FLOPs of the forward pass of a token that attends to `context` keys, counted as `sizes` says."""
    matrices = 2 * (cfg.decoder_parameters + cfg.d * cfg.vocab)
    if isinstance(cfg, MambaConfig):
        return matrices + sum((2 * cfg.conv + 9 * cfg.state) * dims.inner for dims in cfg.layers)
    attentions = zip(map(cfg.sizes, cfg.layers), cfg.windows, strict=True)
    return matrices + 4 * sum(of["k"] * of["g"] * of["h"] * min(context, w or context) for of, w in attentions)


def evaluate(
    params: Params,
    cfg: Config,
    tokenizer: Any,
    *,
    text: str | Int[np.ndarray, "b t"] | None = None,
    window: int = 1024,
    max_tokens: int | None = None,
    choices: list[dict[str, Any]] | None = None,
    limit: int | None = None,
    timed: bool = True,
    progress: Progress | None = None,
) -> dict[str, float | int]:
    """All of it in one flat dictionary, with the keys of `sizes`, `perplexity`, `multiple_choice` and `latency`.

    Args:
      params, cfg: the model.
      tokenizer: of transformers; not used unless there is a text or a question.
      text: what to measure perplexity on, a text or sequences of token ids, or None for none.
      window: see `perplexity`.
      max_tokens: use only so many tokens from the beginning, or None, see `encode`.
      choices: questions, see `load_choices`, or None for none.
      limit: use only so many questions, or None.
      timed: measure latency.
      progress: wraps every long loop: called with a sequence and a description, it returns an iterable over it.

    Raises:
      ValueError: see `perplexity` and `multiple_choice`.
    """
    if max_tokens is not None and max_tokens < window and not isinstance(text, np.ndarray):
        raise ValueError(f"max_tokens: {max_tokens} given, window {window} asked; it must be at least one window")
    out: dict[str, float | int] = {}
    if text is not None:
        out |= perplexity(params, cfg, encode(tokenizer, text, max_tokens), window=window, progress=progress)
    if choices is not None:
        out |= multiple_choice(params, only_llama(cfg, "choice"), tokenizer, choices, limit=limit, progress=progress)
    out |= sizes(params, cfg)
    return out | (latency(params, cfg) if timed else {})
