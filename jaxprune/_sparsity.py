"""What is asked of `jaxprune sparsify`, what it made of each matrix, and both in files."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxprune._files import atomic_file
from jaxprune.models import Config, Params
from jaxprune.models._mesh import on_host
from jaxprune.models._runs import places
from jaxprune.models.axes import INPUT
from jaxprune.recovery import sparse

METHODS = ("magnitude", "wanda", "sparsegpt", "apt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparsity:
    """What is asked for.

    Attributes:
      method: `magnitude`, `wanda`, `sparsegpt` or `apt`.
      pattern: fraction of zeros in each matrix, or N:M.
      layers: fractions of zeros of each layer instead, whose mean over all weights is that of `pattern`; see `layer_sparsity`.
      variant: of `apt`, see `jaxprune.recovery.sparse.apt`; None is SM, and MM for N:M.
      block: of `apt`, columns between two fits, or None for one fit.
      damp: added to the diagonal of the second moments, in means of it.
      skip: what stays dense: `down`, `layers.0`, `layers.0.down`.
    """

    method: str = "apt"
    pattern: sparse.Pattern = sparse.Pattern(0.5)
    layers: tuple[float, ...] | None = None
    variant: str | None = None
    block: int | None = None
    damp: float = 1e-2
    skip: tuple[str, ...] = ()

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method: {self.method!r} given; allowed are {', '.join(METHODS)}")
        if not 0 < self.pattern.fraction < 1:
            raise ValueError(f"sparsity: {self.pattern.fraction} given; give a fraction between 0 and 1, such as 0.5")
        if self.layers is not None and self.pattern.m:
            raise ValueError("layers: fractions given with N:M, which is the same in every layer; give one of them")
        if wrong := [x for x in self.layers or () if not 0 <= x <= 1]:
            raise ValueError(f"layers: {wrong[0]} given; give a fraction from 0 to 1 for each layer")
        if self.variant is not None and (self.method != "apt" or self.variant not in sparse.VARIANTS):
            raise ValueError(f"variant: {self.variant} given; it is for --method apt, one of {', '.join(sparse.VARIANTS)}")
        if self.variant in ("MS", "MM") and not self.pattern.m:
            raise ValueError(f"variant: {self.variant} given; a joint mask needs --nm, such as 2:4; or choose SM")
        if self.block is not None and (self.method != "apt" or self.block < 1):
            raise ValueError(f"block: {self.block} given; it is a number of columns, for --method apt")
        if not self.damp >= 0:
            raise ValueError(f"damp: {self.damp} given; it must be 0 or positive, such as 0.01")


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


def size(cfg: Config, layer: int, name: str) -> int:
    """Weights of a matrix.

    >>> from jaxprune import models, _sparsity
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> _sparsity.size(cfg, 0, "k")
    512
    """
    of = cfg.sizes(cfg.layers[layer])
    return math.prod(of[a] for a in cfg.layer_arrays(cfg.layers[layer])[name])


def chosen(cfg: Config, asked: Sparsity) -> tuple[tuple[str, ...], ...]:
    """Names of the matrices that become sparse, layer by layer.

    Raises:
      ValueError: `skip` names what the model does not have or leaves nothing, N:M does not fit a matrix, or `layers` is not a
        fraction for each layer.

    >>> from jaxprune import models, sparsify
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 2)
    >>> sparsify.chosen(cfg, sparsify.Sparsity(skip=("q", "layers.0", "layers.1.down")))
    ((), ('k', 'v', 'o', 'gate', 'up'))
    """
    has = [[n for n in cfg.matrices if n in cfg.layer_arrays(dims)] for dims in cfg.layers]
    if asked.layers is not None and len(asked.layers) != len(has):
        raise ValueError(f"layers: {len(asked.layers)} fractions given; the model has {len(has)} layers")
    layers = [f"layers.{i}" for i in range(len(has))]
    known = {*cfg.matrices, *layers} | {f"{layer}.{n}" for layer, names in zip(layers, has, strict=True) for n in names}
    if unknown := [name for name in asked.skip if name not in known]:
        raise ValueError(
            f"skip: {unknown[0]!r} given; allowed are {', '.join(cfg.matrices)}, layers.0 to {layers[-1]}, and the two "
            f"together, such as layers.0.{cfg.matrices[-1]}"
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
                narrower = f", or prune to multiples of {asked.pattern.m} (prune --multiple-of)" if INPUT[n] in "fi" else ""
                raise ValueError(
                    f"nm: layers.{i}.{n} has {inputs} inputs, which {asked.pattern.m} does not divide; --skip {n}{narrower}"
                )
    return out


def write_block(file: Path, arrays: dict[str, np.ndarray], seen: dict[str, Matrix]) -> None:
    """Writes the sparse matrices of a block and what became of them, whole or not at all."""
    from safetensors.numpy import save_file

    with atomic_file(file, overwrite=True) as beside:
        save_file({n: np.ascontiguousarray(x) for n, x in arrays.items()}, beside, {n: json.dumps(m) for n, m in seen.items()})


def read_block(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Matrix]]:
    """What `write_block` wrote."""
    from safetensors import safe_open

    with safe_open(file, "np") as f:
        rows = {n: json.loads(text) for n, text in (f.metadata() or {}).items()}
        seen = {n: Matrix(zeros, violations, error, tuple(notes)) for n, (zeros, violations, error, notes) in rows.items()}
        return {n: f.get_tensor(n) for n in f.keys()}, seen  # noqa: SIM118 (not a dict)


def achieved(params: Params, cfg: Config, names: Sequence[str], pattern: sparse.Pattern) -> dict[str, tuple[float, int]]:
    """Fraction of zeros and violations of the pattern, of matrices by names such as `layers.0.q`.

    Raises:
      ValueError: the model has no such matrix.
    """
    where = {f"layers.{layer}": (run.name, i) for layer, (run, i) in enumerate(places(cfg.runs))}
    out = {}
    for name in names:
        layer, _, matrix = name.rpartition(".")
        run, i = where.get(layer, ("", 0))
        if matrix not in params.get(run, {}):
            raise ValueError(f"{name}: recorded as sparse, but the model has no such matrix")
        w = on_host(params[run][matrix], i)
        w = w.reshape(int(np.prod(w.shape[: len(INPUT[matrix])])), -1).T
        out[name] = float((w == 0).mean()), sparse.violations(w, pattern)
    return out
