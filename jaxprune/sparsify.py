"""Sparsity in one shot over a whole model: one block after the other, each from what the sparse blocks before it pass on."""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._losses import Progress
from jaxprune.models import LlamaConfig, Params, reads, rms_norm, sublayer
from jaxprune.models.axes import INPUT, MATRICES
from jaxprune.recovery import sparse

METHODS = ("magnitude", "wanda", "sparsegpt", "apt")
GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))  # matrices that read the same


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparsity:
    """What is asked for.

    Attributes:
      method: `magnitude`, `wanda`, `sparsegpt` or `apt`.
      pattern: fraction of zeros in each matrix, or N:M.
      variant: of `apt`, see `jaxprune.recovery.sparse.apt`; None is SM, and MM for N:M.
      block: of `apt`, columns between two fits, or None for one fit.
      damp: added to the diagonal of the second moments, in means of it.
      skip: what stays dense: `down`, `layers.0`, `layers.0.down`.
    """

    method: str = "apt"
    pattern: sparse.Pattern = sparse.Pattern(0.5)
    variant: str | None = None
    block: int | None = None
    damp: float = 1e-2
    skip: tuple[str, ...] = ()

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method: {self.method!r} given; allowed are {', '.join(METHODS)}")
        if not 0 < self.pattern.fraction < 1:
            raise ValueError(f"sparsity: {self.pattern.fraction} given; give a fraction between 0 and 1, such as 0.5")
        if self.variant is not None and (self.method != "apt" or self.variant not in sparse.VARIANTS):
            raise ValueError(f"variant: {self.variant} given; it is for --method apt, one of {', '.join(sparse.VARIANTS)}")
        if self.variant in ("MS", "MM") and not self.pattern.m:
            raise ValueError(f"variant: {self.variant} given; a joint mask needs --nm, such as 2:4; or choose SM")
        if self.block is not None and (self.method != "apt" or self.block < 1):
            raise ValueError(f"block: {self.block} given; it is a number of columns, for --method apt")


class Matrix(NamedTuple):
    """A matrix that was made sparse.

    Attributes:
      zeros: fraction of its weights that are zero.
      violations: groups of M with more than N weights.
      error: of its output, relative, see `jaxprune.recovery.sparse.relative_loss`.
      notes: what had to be done otherwise than asked.
    """

    zeros: float
    violations: int
    error: float
    notes: tuple[str, ...] = ()


def chosen(cfg: LlamaConfig, asked: Sparsity) -> tuple[tuple[str, ...], ...]:
    """Names of the matrices that become sparse, layer by layer.

    Raises:
      ValueError: `skip` names what the model does not have or leaves nothing, or N:M does not fit a matrix.

    >>> from jaxprune import models, sparsify
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 2)
    >>> sparsify.chosen(cfg, sparsify.Sparsity(skip=("q", "layers.0", "layers.1.down")))
    ((), ('k', 'v', 'o', 'gate', 'up'))
    """
    has = [[n for n in MATRICES if n in cfg.layer_arrays(dims)] for dims in cfg.layers]
    known = {*MATRICES, *(f"layers.{i}" for i in range(len(has)))} | {f"layers.{i}.{n}" for i, x in enumerate(has) for n in x}
    if unknown := [name for name in asked.skip if name not in known]:
        raise ValueError(
            f"skip: {unknown[0]!r} given; allowed are {', '.join(MATRICES)}, layers.0 to layers.{len(has) - 1}, and the two "
            "together, such as layers.0.down"
        )
    out = tuple(
        tuple(n for n in names if not {n, f"layers.{i}", f"layers.{i}.{n}"} & set(asked.skip)) for i, names in enumerate(has)
    )
    if not any(out):
        raise ValueError("skip: leaves no matrix to make sparse; name fewer")
    for i, names in enumerate(out):
        for n in names if asked.pattern.m else ():
            inputs = int(np.prod([cfg.sizes(cfg.layers[i])[a] for a in INPUT[n]]))
            if inputs % asked.pattern.m:
                raise ValueError(
                    f"nm: layers.{i}.{n} has {inputs} inputs, which {asked.pattern.m} does not divide; skip {n}, or prune to "
                    f"multiples of {asked.pattern.m} (prune --multiple-of)"
                )
    return out


def sparsify(
    params: Params,
    cfg: LlamaConfig,
    batches: Sequence[Any],
    asked: Sparsity,
    *,
    checkpoints: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Params, dict[str, Matrix]]:
    """Makes the matrices of all blocks sparse, in the order in which tokens go through them.

    In a block first q, k, v get their zeros, then o from what the sparse attention passes on, then gate and up, then down. On
    the device are the weights of one block, the activations of one batch and one matrix of second moments.

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
    stream = [np.asarray(params["embed"][jnp.asarray(b)]) for b in batches]
    where = [(run.name, i) for run in cfg.runs for i in range(run.length)]
    out = {run.name: {n: np.array(x) for n, x in params.get(run.name, {}).items() if n in MATRICES} for run in cfg.runs}
    found: dict[str, Matrix] = {}
    for layer in range(len(where)) if progress is None else progress(range(len(where)), "sparsifying"):
        name, i = where[layer]
        p = {n: x[i] for n, x in params.get(name, {}).items()}
        file = None if checkpoints is None else checkpoints / f"layer_{layer}.safetensors"
        new, seen = _block(p, names[layer], stream, cfg, asked) if file is None or not file.is_file() else _read(file)
        if file is not None and not file.is_file():
            _write(file, new, seen)
        for n, x in new.items():
            out[name][n][i] = x
            found[f"layers.{layer}.{n}"] = seen[n]
        for at, x in enumerate(stream):
            stream[at] = np.asarray(_after(p | new, x, cfg))
    changed = {run: params.get(run, {}) | jax.tree.map(jnp.asarray, arrays) for run, arrays in out.items() if arrays}
    return params | changed, found


def _block(
    p: dict, names: Sequence[str], stream: Sequence[Any], cfg: LlamaConfig, asked: Sparsity
) -> tuple[dict[str, np.ndarray], dict[str, Matrix]]:
    """The sparse matrices of a block, each group from what those before it pass on."""
    new: dict[str, np.ndarray] = {}
    seen: dict[str, Matrix] = {}
    for group in GROUPS:
        if not (here := [n for n in group if n in names]):
            continue
        gram = np.asarray(sum(_gram(p | new, group[0], x, cfg) for x in stream), np.float64)
        system = sparse.system(gram, asked.damp) if asked.method in ("sparsegpt", "apt") else None
        for n in here:
            old = np.asarray(p[n])
            w = old.astype(np.float32).reshape(len(gram), -1).T  # out, in
            fitted, notes = _one(w, gram, system, asked)
            new[n] = np.asarray(fitted).T.astype(old.dtype).reshape(old.shape)
            made = new[n].astype(np.float32).reshape(len(gram), -1).T
            error = sparse.relative_loss(w, made, gram)
            seen[n] = Matrix(float((made == 0).mean()), sparse.violations(made, asked.pattern), error, notes)
    return new, seen


def _one(w: np.ndarray, gram: np.ndarray, system: sparse.System | None, asked: Sparsity) -> tuple[Any, tuple[str, ...]]:
    pattern = asked.pattern
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
    """Sum of z z^T over tokens of what the matrix `name` reads when `x` comes to its block, float32[in, in]."""
    if name in ("gate", "down"):
        x = sublayer(p, "o", x, cfg)
    if name in ("o", "down"):
        z = reads(p, name, x, cfg)
    else:
        z = rms_norm(x, p["attn_norm" if name == "q" else "mlp_norm"], cfg.norm_eps, width=cfg.norm_width)
    rows = z.reshape(x.shape[0] * x.shape[1], -1).astype(jnp.float32)
    return jnp.matmul(rows.T, rows, precision="highest")


@functools.partial(jax.jit, static_argnames="cfg")
def _after(p, x, cfg):
    return sublayer(p, "down", sublayer(p, "o", x, cfg), cfg)


def _write(file: Path, arrays: dict[str, np.ndarray], seen: dict[str, Matrix]) -> None:
    from safetensors.numpy import save_file

    beside = file.with_suffix(".partial")
    save_file({n: np.ascontiguousarray(x) for n, x in arrays.items()}, beside, {n: json.dumps(m) for n, m in seen.items()})
    os.replace(beside, file)


def _read(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Matrix]]:
    from safetensors import safe_open

    with safe_open(file, "np") as f:
        rows = {n: json.loads(text) for n, text in (f.metadata() or {}).items()}
        seen = {n: Matrix(zeros, violations, error, tuple(notes)) for n, (zeros, violations, error, notes) in rows.items()}
        return {n: f.get_tensor(n) for n in f.keys()}, seen  # noqa: SIM118 (not a dict)


def achieved(params: Params, cfg: LlamaConfig, names: Sequence[str], pattern: sparse.Pattern) -> dict[str, tuple[float, int]]:
    """Fraction of zeros and violations of the pattern, of matrices by names such as `layers.0.q`.

    Raises:
      ValueError: the model has no such matrix.
    """
    where = {f"layers.{run.start + i}": (run.name, i) for run in cfg.runs for i in range(run.length)}
    out = {}
    for name in names:
        layer, _, matrix = name.rpartition(".")
        run, i = where.get(layer, ("", 0))
        if matrix not in params.get(run, {}):
            raise ValueError(f"{name}: recorded as sparse, but the model has no such matrix")
        w = np.asarray(params[run][matrix])[i]
        w = w.reshape(int(np.prod(w.shape[: len(INPUT[matrix])])), -1).T
        out[name] = float((w == 0).mean()), sparse.violations(w, pattern)
    return out
