"""What the dense model says of its layers: sizes of their inputs, outliers among their scores, what zeros in each cost."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._losses import Progress
from jaxprune._sparse_blocks import advance, begin, blocks_of
from jaxprune.models import Config, Params, hidden, layer_of, token_kl
from jaxprune.models._mesh import by_sequence, on_host
from jaxprune.models._runs import places
from jaxprune.recovery.sparse.pattern import Pattern, keep_largest

Names = Sequence[Sequence[str]]  # of the matrices of each layer
Norms = Sequence[Mapping[str, np.ndarray]]  # per layer, matrix -> float32[in]


def input_norms(params: Params, cfg: Config, batches: Sequence[Any], progress: Progress | None = None) -> Norms:
    """The root of the sum of squares, over all tokens, of what each matrix of the dense model reads."""
    stream, where = begin(params, batches, cfg), places(cfg.runs)
    out: list[dict[str, np.ndarray]] = []
    for place in where if progress is None else progress(where, "reading the dense layers"):
        p = layer_of(params, *place)
        out.append({})
        for group in blocks_of(cfg).groups:
            if here := [n for n in group if n in p]:
                squares = sum(on_host(_squares(p, group[0], x, cfg)).astype(np.float64) for x in stream)
                out[-1] |= dict.fromkeys(here, np.sqrt(squares).astype(np.float32))
            advance(stream, p, group[0], cfg)
    return out


def outlier_shares(params: Params, cfg: Config, norms: Norms, names: Names, m: float = 5.0) -> tuple[float, ...]:
    r"""Per layer the fraction of weights whose score :math:`|w_{ij}| \, \|x_j\|_2` is above `m` times the mean of the layer.

    Args:
      params, cfg: the dense model.
      norms: of the inputs, as `input_norms` gives them.
      names: the matrices of each layer that count.
      m: the paper's M.

    Reference: Yin et al., `Outlier Weighed Layerwise Sparsity <https://arxiv.org/abs/2310.05175>`_, 2023, section 3.1.
    """
    out = []
    for (run, i), norm, here in zip(places(cfg.runs), norms, names, strict=True):
        scores = [_scores(params[run.name][n][i], norm[n]) for n in here]
        weights = sum(s.size for s in scores)
        above = m * sum(float(jnp.sum(s)) for s in scores) / max(weights, 1)
        out.append(sum(int(jnp.sum(s > above)) for s in scores) / max(weights, 1))
    return tuple(out)


def divergences(
    params: Params,
    cfg: Config,
    norms: Norms,
    names: Names,
    tokens: Any,
    fractions: Sequence[float],
    progress: Progress | None = None,
) -> np.ndarray:
    """What a layer's zeros alone cost: the divergence of next tokens from the dense model, by Wanda's masks without an update.

    Args:
      params, cfg: the dense model.
      norms, names: as in `outlier_shares`.
      tokens: int32[b, t] that the divergence is measured on.
      fractions: of zeros in the layer.
      progress: wraps the sequence of layers; called with it and a description.

    Returns:
      Nats a token, float64[layers, fractions]; zeros for a layer without matrices.

    Raises:
      ValueError: a divergence that is not a number.
    """
    where, tokens = places(cfg.runs), jnp.asarray(tokens)
    dense, out = _stream(params, tokens, cfg), np.zeros((len(where), len(fractions)))
    for layer in range(len(where)) if progress is None else progress(range(len(where)), "measuring layers"):
        run, i = where[layer]
        for j, fraction in enumerate(fractions if names[layer] else ()):
            arrays = dict(params[run.name])
            for n in names[layer]:
                keep = keep_largest(_scores(arrays[n][i], norms[layer][n]), Pattern(fraction), per_row=True)
                arrays[n] = arrays[n].at[i].multiply(keep.T.reshape(arrays[n].shape[1:]))
            out[layer, j] = _divergence(params, dense, params | {run.name: arrays}, tokens, cfg)
    if not np.isfinite(out).all():
        raise ValueError("sparsify: divergences of layers contain NaN or infinity; check the weights and the calibration data")
    return out


def _scores(w: jax.Array, norm: np.ndarray) -> jax.Array:
    """[out, in]."""
    return jnp.abs(w.astype(jnp.float32).reshape(len(norm), -1).T) * norm


@functools.partial(jax.jit, static_argnames=("name", "cfg"))
def _squares(p, name, x, cfg):
    rows = blocks_of(cfg).reads(p, name, by_sequence(x), cfg).astype(jnp.float32)
    return jnp.sum(rows * rows, (0, 1)).reshape(-1)


@functools.partial(jax.jit, static_argnames="cfg")
def _stream(params, tokens, cfg):
    return hidden(params, tokens, cfg)


@functools.partial(jax.jit, static_argnames="cfg")
def _divergence(params, x, other, tokens, cfg):
    return token_kl(params, x, other, hidden(other, tokens, cfg), cfg).mean()
