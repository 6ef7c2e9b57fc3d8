"""Sparsity in one shot over a whole model: one block after the other, each from what the sparse blocks before it pass on."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _beside, _hosts
from jaxprune._losses import Progress
from jaxprune._sparse_blocks import advance, begin, blocks_of
from jaxprune._sparsity import METHODS, Matrix, Sparsity, achieved, chosen, read_block, size, write_block
from jaxprune.models import Config, Params, layer_of
from jaxprune.models._mesh import by_sequence, on_host
from jaxprune.models._runs import places
from jaxprune.recovery import sparse

__all__ = ["METHODS", "Matrix", "Sparsity", "achieved", "chosen", "size", "sparsify"]


def sparsify(
    params: Params,
    cfg: Config,
    batches: Sequence[Any],
    asked: Sparsity,
    *,
    checkpoints: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Params, dict[str, Matrix]]:
    """Makes the matrices of all blocks sparse, in the order in which tokens go through them.

    In a block first q, k, v get their zeros, then o from what the sparse attention passes on, then gate and up, then down; of
    Mamba in_proj, x_proj, dt_proj and out_proj, while conv1d, A_log and D stay as they are. On the device are the weights of
    one block, the activations of one batch and one matrix of second moments.

    Args:
      params, cfg: the model.
      batches: int32[b, t] arrays of calibration tokens.
      asked: method and pattern.
      checkpoints: a folder that is there: finished blocks are written to it, and those that are there are not done again. The
        caller sees to it that it belongs to the same run.
      progress: wraps the sequence of layers; called with it and a description.

    Returns:
      The parameters, in their shapes and dtypes, and what became of each matrix, by names such as `layers.0.q`.

    Raises:
      ValueError: no batches, what `chosen` raises, or statistics that are not finite.

    Reference: the order of blocks is that of Frantar and Alistarh, `SparseGPT <https://arxiv.org/abs/2301.00774>`_, 2023, and
    of Wanda. Within a block their code takes the inputs of all matrices from the dense block; what is done here is
    SparseGPT's option `--true-sequential`.

    >>> import jax
    >>> from jaxprune import models, sparsify
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 2)
    >>> params, tokens = models.init(jax.random.key(0), cfg), jax.numpy.arange(60).reshape(2, 30)
    >>> new, found = sparsify.sparsify(params, cfg, [tokens], sparsify.Sparsity(method="wanda"))
    >>> found["layers.1.down"].zeros, float((new["run_0"]["down"] == 0).mean())
    (0.5, 0.5)
    """
    if not batches:
        raise ValueError("batches: none given; sparsity needs at least one batch of calibration tokens")
    names = chosen(cfg, asked)
    owed = 0.0  # zeros that rounding left undone, where layers have fractions of their own
    kind = blocks_of(cfg)
    stream = begin(params, batches, cfg)
    where = places(cfg.runs)
    out = {
        run.name: {n: np.array(on_host(x)) for n, x in params.get(run.name, {}).items() if n in cfg.matrices}
        for run in cfg.runs
    }
    found: dict[str, Matrix] = {}
    for layer in range(len(where)) if progress is None else progress(range(len(where)), "sparsifying"):
        run, i = where[layer]
        name, p = run.name, layer_of(params, run, i)
        file = None if checkpoints is None else checkpoints / f"layer_{layer}.safetensors"
        if file is not None and _hosts.stands(file):
            new, seen = read_block(file)
            for group in kind.groups:
                advance(stream, p | new, group[0], cfg)
        else:
            new, seen = _block(p, names[layer], stream, cfg, asked, layer, owed)
            if file is not None:
                _hosts.by_first(write_block, file, new, seen)
        owed += _owed(asked, layer, seen, new)
        for n, x in new.items():
            out[name][n][i] = x
            found[f"layers.{layer}.{n}"] = seen[n]
    put = _beside.like(params, cfg)
    changed = {
        run: params.get(run, {}) | {n: put((run, n), x) for n, x in arrays.items()} for run, arrays in out.items() if arrays
    }
    return params | changed, found


def _owed(asked: Sparsity, layer: int, seen: dict[str, Matrix], new: dict[str, np.ndarray]) -> float:
    """Zeros that rounding left undone in matrices of a layer with a fraction of its own."""
    return 0.0 if asked.layers is None else sum(((asked.layers[layer] - seen[n].zeros) * new[n].size for n in seen), 0.0)


def _pattern(asked: Sparsity, layer: int, owed: float, weights: int) -> sparse.Pattern:
    """The pattern of a matrix; with fractions by layers it makes up for what the matrices before it owe."""
    if asked.layers is None:
        return asked.pattern
    return asked.pattern._replace(fraction=min(max(asked.layers[layer] + owed / weights, 0.0), 1.0))


def _block(
    p: dict, names: Sequence[str], stream: list[np.ndarray], cfg: Config, asked: Sparsity, layer: int, owed: float
) -> tuple[dict[str, np.ndarray], dict[str, Matrix]]:
    """The sparse matrices of a block, each group from what those before it pass on; takes the stream through, in place.

    `owed` are zeros that matrices of the layers before left undone.
    """
    new: dict[str, np.ndarray] = {}
    seen: dict[str, Matrix] = {}
    for group in blocks_of(cfg).groups:
        if here := [n for n in group if n in names]:
            gram = on_host(sum(_gram(p | new, group[0], x, cfg) for x in stream)).astype(np.float64)
            system = sparse.system(gram, asked.damp) if asked.method in ("sparsegpt", "apt") else None
        for n in here:
            old = on_host(p[n])
            pattern = _pattern(asked, layer, owed + _owed(asked, layer, seen, new), old.size)
            w = old.astype(np.float32).reshape(len(gram), -1).T  # out, in
            fitted, notes = _one(w, gram, system, asked, pattern)
            new[n] = np.asarray(fitted).T.astype(old.dtype).reshape(old.shape)
            made = new[n].astype(np.float32).reshape(len(gram), -1).T
            error = sparse.relative_loss(w, made, gram)
            seen[n] = Matrix(float((made == 0).mean()), sparse.violations(made, pattern), error, notes)
        advance(stream, p | new, group[0], cfg)
    return new, seen


def _one(
    w: np.ndarray, gram: np.ndarray, system: sparse.System | None, asked: Sparsity, pattern: sparse.Pattern
) -> tuple[Any, tuple[str, ...]]:
    if system is None:
        keep = sparse.keep_largest(jnp.abs(w), pattern) if asked.method == "magnitude" else sparse.wanda(w, gram, pattern)
        return np.where(keep, w, 0), ()
    if asked.method == "sparsegpt":
        done = sparse.sparsegpt(w, system, pattern)
    else:
        done = sparse.apt(w, system, pattern, asked.variant or ("MM" if pattern.m else "SM"), block=asked.block)
    return done.w, done.notes


@functools.partial(jax.jit, static_argnames=("name", "cfg"))
def _gram(p, name, x, cfg):
    """Sum of z z^T over tokens of what the matrix `name` reads when `x` comes to its sublayer, float32[in, in]."""
    rows = blocks_of(cfg).reads(p, name, by_sequence(x), cfg).reshape(x.shape[0] * x.shape[1], -1).astype(jnp.float32)
    return jnp.matmul(rows.T, rows, precision="highest")
