"""SparseGPT and APT on one matrix: ours against SparseGPT in plain torch, from second moments and weights to sparse weights.

    python benchmarks/sparsity_speed.py [--model smollm2] [--matrices q gate down] [--widths 1024 2048 4096 11008]
        [--patterns 0.5 2:4] [--repeats 3] [--json FILE]

Second moments are factored in each program. SparseGPT is ours and torch's with the same damping; torch's comparison removes one
weight more in each block. `first` has the compilation in it. `error` is that of the output, relative; `mask as torch` the share
of weights that are zero in both or in neither.

What it printed on 2026-11-23, with the commands, is in docs/sparsity.md.
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _common
import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Measures one-shot sparsity of single matrices, against torch."""

    model: str = "smollm2"
    """Model that the first matrices are taken from."""
    layer: int = 10
    """Their layer."""
    matrices: tuple[str, ...] = ("q", "gate", "down")
    """Their names; give none to leave them out."""
    calibration: str = "builtin"
    """Text for their second moments."""
    widths: tuple[int, ...] = (1024, 2048, 4096, 11008)
    """Inputs of made-up matrices; give none to leave them out."""
    weights: int = 2**20
    """What one of them has at most; it has as many rows as columns, or fewer."""
    patterns: tuple[str, ...] = ("0.5", "2:4")
    """Fractions of zeros, or N:M."""
    repeats: int = 3
    """Rounds that count; one more does not."""
    json: Path | None = None
    """Write the result to this file, too."""


def of_model(args: Args) -> Iterator[tuple[str, Any, Any]]:
    """Yields name, weights [out, in] and second moments of what the matrix reads in the dense model, over 8 x 512 tokens."""
    import numpy as np

    from jaxprune import models, sparsify
    from jaxprune._sparse_blocks import advance, begin, blocks_of
    from jaxprune.models._runs import places

    params, cfg = models.load(args.model, dtype="float32")
    tokens = _common.calibration(args.calibration, args.model, 8, 512)
    stream = begin(params, list(tokens.reshape(4, 2, 512)), cfg)
    for layer, (run, i) in enumerate(places(cfg.runs)[: args.layer + 1]):
        p = models.layer_of(params, run, i)
        for group in blocks_of(cfg).groups:
            for name in set(group) & set(args.matrices) if layer == args.layer else ():
                gram = np.asarray(sum(sparsify._gram(p, group[0], x, cfg) for x in stream))
                yield name, np.ascontiguousarray(np.asarray(p[name]).reshape(len(gram), -1).T), gram
            advance(stream, p, group[0], cfg)


def made_up(out: int, n: int) -> tuple[Any, Any]:
    """Weights [out, n] and second moments [n, n] of inputs of different sizes whose k-th direction has k^-0.75 of the first's.

    That is how eigenvalues fall in SmolLM2. Of many inputs 1024 directions are made and the others are all alike.
    """
    import numpy as np

    rng, rank = np.random.default_rng(n), min(n, 1024)
    share = np.arange(1, rank + 1) ** -0.75
    directions = (rng.normal(size=(n, rank)) * np.sqrt(share / share.sum())).astype(np.float32)
    gram = directions @ directions.T
    gram[np.diag_indices(n)] += 0.01
    sizes = np.exp(rng.normal(size=n) / 2).astype(np.float32)
    gram *= sizes[:, None] * sizes
    return rng.normal(size=(out, n)).astype(np.float32), gram


def programs(w: Any, gram: Any, text: str) -> dict[str, Callable[[], Any]]:
    """What is compared, each a function that returns the sparse weights; second moments are factored in each."""
    import torch
    from _torch_sparsegpt import sparsegpt

    from jaxprune.recovery import sparse

    pattern = sparse.n_of_m(text) if ":" in text else sparse.Pattern(float(text))
    nm = (pattern.n, pattern.m) if pattern.m else None
    variant = "MM" if nm else "SM"
    w_torch, gram_torch = torch.tensor(w), torch.tensor(gram)
    return {
        "torch SparseGPT": lambda: sparsegpt(w_torch, gram_torch, pattern.fraction, nm).numpy(),
        "SparseGPT": lambda: sparse.sparsegpt(w, sparse.system(gram), pattern).w,
        f"APT, {variant}": lambda: sparse.apt(w, sparse.system(gram), pattern, variant).w,
    }


def measure(name: str, w: Any, gram: Any, text: str, repeats: int) -> list[dict[str, Any]]:
    """The rows of a matrix, one a program."""
    import numpy as np

    from jaxprune.recovery import sparse

    made: dict[str, Any] = {}
    spent: dict[str, list[_common.Spent]] = {}

    def kept(program: str, run: Callable[[], Any]) -> Any:
        made[program] = run()
        return made[program]  # which may still be computed

    for _ in range(repeats + 1):
        for program, run in programs(w, gram, text).items():
            spent.setdefault(program, []).append(_common.spent(functools.partial(kept, program, run)))
    zeros = {program: np.asarray(x) == 0 for program, x in made.items()}
    torch, rows = _common.median(spent["torch SparseGPT"][1:]), []
    for program, rounds in spent.items():
        cost = _common.median(rounds[1:])
        rows.append(
            {"matrix": f"{name} {w.shape[0]} x {w.shape[1]}", "pattern": text, "program": program}
            | {"first, s": rounds[0].clock, "s": cost.clock, "/ torch": cost.clock / torch.clock}
            | {"processor, s": cost.processor, "its / torch": cost.processor / torch.processor}
            | {"error": f"{sparse.relative_loss(w, made[program], gram):.5f}"}
            | {"mask as torch": f"{np.mean(zeros[program] == zeros['torch SparseGPT']):.5f}"}
        )
    return rows


def main(args: Args) -> None:
    """Measures every matrix and pattern in turn, with a line for each that is done."""
    rows: list[dict[str, Any]] = []
    matrices = itertools.chain(
        of_model(args) if args.matrices else (),
        (("width", *made_up(min(n, max(1, args.weights // n)), n)) for n in args.widths),
    )
    for name, w, gram in matrices:
        for text in args.patterns:
            rows += measure(name, w, gram, text, args.repeats)
            for row in rows[-3:]:
                print(*(f"{v:.3f}" if isinstance(v, float) else v for v in row.values()), sep="  ", file=sys.stderr, flush=True)
    _common.show(f"{args.model}, layer {args.layer}; median of {args.repeats}", rows, args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
