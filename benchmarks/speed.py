"""Speed against what the machine can do and against torch: one command, all ratios from one run.

    python benchmarks/speed.py [--repeats 5] [--colds 3] [--torch-pruning DIR] [--json FILE]

SmolLM2-135M, 10 x 128 tokens, float32. Medians; what is compared runs in turn.

- `limits`: the rate of a product of two 2048 x 2048 matrices, of the products of the model's own shapes (matrices of a layer
  times all tokens), and of reading as many bytes as the weights have (their sum).
- `scoring`: the programs of `scoring_time.py`, with the FLOPs of the matrix products in the compiled program; `limit` is the
  part of the best measured rate that the whole program reaches.
- `decode`: one token after another, batch 1, behind a prompt of 128 tokens; the limit reads all weights once a token, `its
  products` are those with weights, and nothing between them.
- `cold`: processes from start to exit, each reading the same folder and tokens and writing the pruned model, with LLM-Pruner's
  setting (20 %, layers 4 to 27): `jaxprune prune`, compilation and verification included; plain torch, which forms the full
  gradient (`_torch_gradient.llm_pruner`); Torch-Pruning where DIR has it (`pip install --target DIR --no-deps torch-pruning`).

The last table holds the targets against what was measured. On a machine with other load only `processor` ratios say something.

2026-11-23, 2 idle cores, `--repeats 5 --colds 3`. Cold processes: jaxprune 13.1 s, torch 15.5 s. Between two measurements of
decoding a read of the weights takes 13.2 ms (41 GB/s); products run at up to 369 GFLOP/s:

    program          s      processor, s  GFLOP     GFLOP/s  limit  / gradient, remat
    ---------------  -----  ------------  --------  -------  -----  -----------------
    forward          1.098  1.978         352.771   321.354  0.870  0.289
    floor            3.039  5.509         924.516   304.183  0.824  0.801
    taps             3.649  6.921         1194.184  327.240  0.886  0.962
    gradient, remat  3.793  7.099         1194.184  314.837  0.853  1.000
    gradient         5.557  10.692        983.572   176.999  0.479  1.465

    target                                asked    measured    met
    ------------------------------------  -------  --------  -----
    taps / forward + backward with remat  <= 1.25  0.962      True
    taps, part of the limit               >= 0.6   0.886      True
    cold prune / cold torch               < 1      0.846      True
    decode / limit                        <= 1.3   1.420     False

Why decoding misses its target, measured later on a slower day (`--repeats 7`, a read of the weights 18.6 and 20.4 ms): a
token took 32.4 and 36.5 ms, its products with weights alone 20.9 and 24.5 ms, 1.12 and 1.20 times the read, each matrix an
array of its own. The rest, a third, are hundreds of small operations, and the copy that `lax.scan` makes of each layer's
weights: without the loop, layers and caches apart, a token took 0.93 times as long, and compiling twice.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _cold
import _common
import pruned_speed
import scoring_time
import tyro

CALLS = 5  # of a limit's program in a measurement
TARGETS = {  # what -> (at most or at least, number)
    "taps / forward + backward with remat": ("<=", 1.25),
    "taps, part of the limit": (">=", 0.6),
    "cold prune / cold torch": ("<", 1.0),
    "decode / limit": ("<=", 1.3),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Measures speed against the machine's limits and against torch."""

    model: str = "smollm2"
    """Model to prune."""
    samples: int = 10
    """Calibration sequences."""
    length: int = 128
    """Tokens in a sequence."""
    new_tokens: int = 64
    """Tokens that are decoded."""
    repeats: int = 5
    """Rounds of programs that count, after one that does not."""
    colds: int = 3
    """Cold processes of each program; 0 leaves them out."""
    calibration: str = "builtin"
    """Text of the cold processes."""
    torch_pruning: Path | None = None
    """Folder that Torch-Pruning was installed into."""
    json: Path | None = None
    """Write the result to this file, too."""


def limits(params: Any, cfg: Any, tokens: int) -> dict[str, tuple[Any, float]]:
    """Name -> (program, FLOPs or bytes)."""
    import jax
    import jax.numpy as jnp

    square, rows = jnp.ones((2048, 2048)), jnp.ones((tokens, cfg.d))
    matrices = _matrices(params, cfg, 0)
    weights = jnp.concatenate([x.ravel() for x in jax.tree.leaves(params)])
    product, total = jax.jit(jnp.matmul), jax.jit(jnp.sum)
    every = jax.jit(lambda x, ws: [x @ (w if len(w) == cfg.d else w.T) for w in ws])
    once = {
        "square": (lambda: product(square, square), 2 * 2048**3),
        "model's shapes": (lambda: every(rows, matrices), 2.0 * tokens * sum(w.size for w in matrices)),
        "read": (lambda: total(weights), weights.nbytes),
    }
    return {n: (lambda f=f: [f() for _ in range(CALLS)], CALLS * amount) for n, (f, amount) in once.items()}


def warm(args: Args) -> dict[str, list[dict[str, Any]]]:
    """The tables of what runs in this process."""
    import jax

    from jaxprune import _hlo, models

    params, cfg = models.load(args.model, dtype="float32")
    tokens = jax.random.randint(jax.random.key(0), (args.samples, args.length), 0, cfg.vocab)
    compiled = {n: jax.jit(f).lower(params, tokens).compile() for n, f in scoring_time.programs(cfg).items()}
    bounds = limits(params, cfg, tokens.size)
    runs = {n: run for n, (run, _) in bounds.items()} | {n: lambda f=f: f(params, tokens) for n, f in compiled.items()}
    found = _common.alternate(runs, args.repeats)
    rates = {n: amount / found[n].clock / 1e9 for n, (_, amount) in bounds.items()}
    products = ("square", "model's shapes")
    best = max(rates[n] for n in products)
    best_of_cores = max(bounds[n][1] / found[n].processor / 1e9 for n in products)
    scoring = []
    for name, program in compiled.items():
        flops = _hlo.count(program.as_text()).flops
        scoring.append(
            {
                "program": name,
                "s": found[name].clock,
                "processor, s": found[name].processor,
                "GFLOP": flops / 1e9,
                "GFLOP/s": flops / found[name].clock / 1e9,
                "limit": flops / found[name].clock / 1e9 / best,
                "limit, processor": flops / found[name].processor / 1e9 / best_of_cores,
                "/ gradient, remat": found[name].clock / found["gradient, remat"].clock,
                "processor / that": found[name].processor / found["gradient, remat"].processor,
            }
        )
    limit_rows = [{"limit": n, "s": found[n].clock, "processor, s": found[n].processor, "G/s": rates[n]} for n in bounds]
    return dict(limits=limit_rows, scoring=scoring, decode=[_decode(args, params, cfg, tokens, bounds["read"])])


def _matrices(params: Any, cfg: Any, layer: int) -> list[Any]:
    """The matrices of a layer, each an array of its own, [in, out]."""
    from jaxprune.models import axes

    own = {n: params["run_0"][n][layer] for n in axes.MATRICES}
    return [x.reshape(-1, cfg.d) if n in axes.OUTPUT.values() else x.reshape(cfg.d, -1) for n, x in own.items()]


def _decode(args: Args, params: Any, cfg: Any, tokens: Any, read: tuple[Any, float]) -> dict[str, Any]:
    """Milliseconds a token, those of its products with weights alone, and those of a read of the weights, in turn."""
    import jax
    import jax.numpy as jnp

    prompt = tokens[:1]
    matrices = [w for layer in range(len(cfg.layers)) for w in _matrices(params, cfg, layer)]
    product = jax.jit(lambda embed, ws: [jnp.ones((1, len(w))) @ w for w in ws] + [jnp.ones((1, cfg.d)) @ embed.T])
    rounds = []
    for _ in range(args.repeats + 1):
        decoded = pruned_speed.decoding(params, cfg, prompt, args.new_tokens).clock / args.new_tokens
        products = _common.spent(lambda: [product(params["embed"], matrices) for _ in range(CALLS)]).clock / CALLS
        rounds.append((decoded, products, _common.spent(read[0]).clock / CALLS))
    token, products, limit = (1000 * statistics.median(x) for x in zip(*rounds[1:], strict=True))
    row = {"ms a token": token, "its products, ms": products, "MiB read": read[1] / CALLS / _common.MIB, "limit, ms": limit}
    return row | {"/ limit": token / limit, "products / limit": products / limit}


def cold(args: Args) -> list[dict[str, Any]]:
    """Each program in processes of its own, in turn."""
    programs = ["jaxprune", "torch"] + (["torch-pruning"] if args.torch_pruning else [])
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    with tempfile.TemporaryDirectory() as folder:
        tokens = [folder, args.model, args.calibration, args.samples, args.length]
        _common.in_new_process(__file__, "--prepare", *tokens)
        for i in range(args.colds):
            for name in programs:
                words = _cold.command(name, Path(folder), f"{name}-{i}", args.torch_pruning)
                runs[name].append(_process(words))
    medians = {n: {k: statistics.median(r[k] for r in found) for k in found[0]} for n, found in runs.items()}
    torch = medians["torch"]
    return [{"program": n} | m | {f"{k} / torch": m[k] / torch[k] for k in ("s", "processor, s")} for n, m in medians.items()]


def _process(command: list[str]) -> dict[str, float]:
    """Seconds on the clock and of all cores that a process takes from start to exit."""
    begin, before = time.perf_counter(), _cold.children()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr}")
    return {"s": time.perf_counter() - begin, "processor, s": _cold.children() - before}


def targets(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each target that something was measured for."""
    scoring = {row["program"]: row for row in found["scoring"]}
    measured = {
        "taps / forward + backward with remat": scoring["taps"]["/ gradient, remat"],
        "taps, part of the limit": scoring["taps"]["limit"],
        "decode / limit": found["decode"][0]["/ limit"],
    }
    if "cold" in found:
        measured["cold prune / cold torch"] = found["cold"][0]["s / torch"]
    met = {"<=": lambda x, y: x <= y, ">=": lambda x, y: x >= y, "<": lambda x, y: x < y}
    return [
        {"target": name, "asked": f"{sign} {number:g}", "measured": measured[name], "met": met[sign](measured[name], number)}
        for name, (sign, number) in TARGETS.items()
        if name in measured
    ]


def main(args: Args) -> None:
    """Measures and prints the tables."""
    from jaxprune._json import write_json

    found = dict(cold=cold(args)) if args.colds else {}
    found |= warm(args)
    found["targets"] = targets(found)
    for name, rows in found.items():
        _common.show(f"\n{name}", rows, None)
    if args.json is not None:
        write_json(args.json, found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--prepare"]:
        folder, model, source, samples, length = sys.argv[2:]
        print(json.dumps(_cold.prepare(Path(folder), model, source, int(samples), int(length))))
    else:
        main(tyro.cli(Args))
