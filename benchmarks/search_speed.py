"""Candidates a second: by gates, by the database of compressed layers, and by cutting the model anew for each.

    python benchmarks/search_speed.py [--model smollm2] [--candidates 12] [--json FILE]

Candidates are random allocations at 20 % of the decoder, all layers of different widths as searches make them; each is measured
on the same tokens. `cut` slices the model and measures the slices, whose shapes are a program to compile each time. The one
program of the other two is compiled once in a search: `first` is that and its first candidate. What is saved is compilation,
so with more tokens, whose forward pass all ways share, the ratio falls.

2026-11-22, 2 cores, idle:

    way       first, s  s a candidate  candidates / s  times as many as by cutting
    --------  --------  -------------  --------------  ---------------------------
    gates     1.380     0.265          3.775           15.500
    database  1.190     0.325          3.081           12.600
    cut       0.000     4.104          0.244           1.000
"""

import dataclasses
import time
from pathlib import Path

import _common
import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Measures how many candidates a second a search sees."""

    model: str = "smollm2"
    """Model to search."""
    candidates: int = 12
    """By gates and by the database."""
    rebuilt: int = 3
    """By cutting."""
    sequences: int = 1
    """Sequences that the loss is measured on."""
    length: int = 256
    """Tokens in each."""
    json: Path | None = None
    """Write the result to this file, too."""


def main(args: Args) -> None:
    """Measures the three ways in turn and prints the table."""
    import jax
    import numpy as np

    from jaxprune import allocate, models, plan, surgery
    from jaxprune.search import database, sizes
    from jaxprune.search.fitness import gate_fitness

    params, cfg = models.load(args.model, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, cfg.vocab, (args.sequences, args.length), np.int32)
    constraints = allocate.Constraints(multiple_of=8, min_kept=0.25)
    counts, rng = models.unit_counts(cfg), np.random.default_rng(0)
    scores = tuple({a: rng.random(n).astype(np.float32) for a, n in layer.items()} for layer in counts)
    whole = plan.Plan(tuple({a: np.arange(n) for a, n in layer.items()} for layer in counts), counts)
    window = sizes.of_ratio(cfg, 0.2, 8)

    def candidate() -> plan.Plan:
        keep = tuple(layer | {"f": rng.permutation(len(layer["f"]))[: 8 * rng.integers(96, 192)]} for layer in whole.keep)
        found = sizes.fit(plan.Plan(keep, counts), cfg, window, constraints, rng)
        assert found is not None, "widths near the target can be brought there"
        return found

    plans = [candidate() for _ in range(args.candidates)]
    db = database.build(params, cfg, scores, [tokens], constraints, levels=8)
    by_database, by_gates = database.losses_of(params, cfg, db), gate_fitness(params, cfg, tokens)
    levels = [tuple({a: int(rng.integers(len(c))) for a, c in layer.items()} for layer in db.counts) for _ in plans]

    def cut(p: plan.Plan) -> float:
        small, small_cfg = surgery.cut(params, cfg, p)
        loss = jax.jit(lambda params, tokens: models.loss_fn(small_cfg, remat=False)(params, {}, tokens).mean())
        return float(loss(small, tokens))

    def timed(measure, each) -> float:
        begin = time.perf_counter()
        for x in each:
            measure(x)
        return (time.perf_counter() - begin) / len(each)

    first = [timed(lambda x: by_gates([x]), plans[:1]), timed(lambda x: by_database([x], tokens), levels[:1]), 0.0]
    seconds = [
        timed(lambda x: by_gates([x]), plans),
        timed(lambda x: by_database([x], tokens), levels),
        timed(cut, plans[: args.rebuilt]),
    ]
    np.testing.assert_allclose(by_gates(plans[:1]), cut(plans[0]), rtol=1e-4)
    rows = [
        {"way": way, "first, s": round(f, 2), "s a candidate": round(s, 3), "candidates / s": round(1 / s, 3),
         "times as many as by cutting": round(seconds[2] / s, 1)}
        for way, f, s in zip(("gates", "database", "cut"), first, seconds, strict=True)
    ]  # fmt: skip
    _common.show(f"{args.model}, {args.sequences} x {args.length} tokens, 20 % removed", rows, args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
