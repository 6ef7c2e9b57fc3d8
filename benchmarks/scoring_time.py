"""Time that scoring takes, against the least that any gradient takes and against the gradient by all weights.

    python benchmarks/scoring_time.py [--model smollm2] [--samples 10] [--length 128] [--repeats 3] [--json FILE]

Element-wise first-order Taylor scores (param_first) on 10 x 128 tokens, float32; one process, the programs in turn, medians.

- `forward`: the loss alone;
- `floor`: one forward and one backward pass by activations (gates), layers recomputed: three matrix products a matrix;
- `taps`: what `jaxprune prune` does; it forms every weight gradient once, which is a fourth product in the decoder and none in
  the output head;
- `gradient, remat`, `gradient`: by all weights, with layers recomputed and without.

`compile` is tracing and compiling, once in a process. `processor` is the time of all cores, which other programs disturb less.
`products` are the matrix products of a program, attention scores left out: its ratio to the floor if nothing else took time.

2026-11-22, 2 cores that other programs used as well (load 6), `--repeats 2`:

    program          compile, s  run, s  / floor  / gradient  processor, s  / floor   products / floor
    ---------------  ----------  ------  -------  ----------  ------------  --------  ----------------
    forward          1.832       4.699   0.453    0.309       2.500         0.406     0.333
    floor            7.047       10.372  1.000    0.682       6.152         1.000     1.000
    taps             8.328       12.750  1.229    0.838       7.842         1.275     1.263
    gradient, remat  12.823      12.319  1.188    0.810       7.731         1.257     1.333
    gradient         17.534      15.213  1.467    1.000       8.359         1.359     1.070
"""

import dataclasses
import time
from pathlib import Path

import _common
import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Measures the time that scoring takes."""

    model: str = "smollm2"
    """Model to score."""
    samples: int = 10
    """Calibration sequences."""
    length: int = 128
    """Tokens in a sequence."""
    repeats: int = 3
    """Rounds that count, after one that does not."""
    json: Path | None = None
    """Write the result to this file, too."""


def programs(cfg) -> dict:
    """Name -> function of (params, tokens)."""
    import jax

    from jaxprune import models, scorers

    loss, probes = models.loss_fn(cfg), models.probes(cfg)

    def scores(scorer):
        return lambda params, tokens: scorer.finalize(scorer.update(scorer.init(probes), params, probes, tokens))

    def full(loss):
        return scores(scorers.full_taylor(loss, lambda tree: models.sum_over_units(tree, cfg)))

    return {
        "forward": lambda params, tokens: loss(params, {}, tokens),
        "floor": lambda params, tokens: jax.grad(lambda g: loss(params, {"gates": g}, tokens).sum())(probes["gates"]),
        "taps": scores(scorers.taylor(loss)),
        "gradient, remat": full(loss),
        "gradient": full(models.loss_fn(cfg, remat=False)),
    }


def products(cfg) -> dict[str, float]:
    """Matrix products of each program in units of those of the floor; the head is always recomputed, in chunks."""
    decoder, head = cfg.decoder_parameters, cfg.d * cfg.vocab
    passes = {"forward": (1, 1), "floor": (3, 3), "taps": (4, 3), "gradient, remat": (4, 4), "gradient": (3, 4)}
    return {name: (d * decoder + h * head) / (3 * (decoder + head)) for name, (d, h) in passes.items()}


def main(args: Args) -> None:
    """Compiles the programs, runs them in turn and prints the table."""
    import jax

    from jaxprune import models

    params, cfg = models.load(args.model, dtype="float32")
    tokens = jax.random.randint(jax.random.key(0), (args.samples, args.length), 0, cfg.vocab)
    compiled, compile_time = {}, {}
    for name, function in programs(cfg).items():
        begin = time.perf_counter()
        compiled[name] = jax.jit(function).lower(params, tokens).compile()
        compile_time[name] = time.perf_counter() - begin
    runs = {name: lambda f=f: f(params, tokens) for name, f in compiled.items()}
    found, expected = _common.alternate(runs, args.repeats), products(cfg)
    rows = [
        {
            "program": name,
            "compile, s": compile_time[name],
            "run, s": found[name].clock,
            "/ floor": found[name].clock / found["floor"].clock,
            "/ gradient": found[name].clock / found["gradient"].clock,
            "processor, s": found[name].processor,
            "/ floor ": found[name].processor / found["floor"].processor,
            "products / floor": expected[name],
        }
        for name in compiled
    ]
    title = f"{args.model}, {args.samples} x {args.length} tokens, median of {args.repeats}"
    _common.show(title, rows, args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
