"""Memory that scoring needs: XLA's temporaries and the peak of the process, as ratios to the weights.

    python benchmarks/scoring_memory.py [--model smollm2] [--samples 10] [--length 128] [--json FILE]

Element-wise first-order Taylor scores (param_first) of all MLP channels and KV groups on 10 x 128 tokens, float32:

- `forward`: the loss alone, the floor;
- `taps`: what `jaxprune prune` does: scores are derivatives by taps, layers are recomputed in the backward pass;
- `gradient, remat`: the gradient by all weights, layers recomputed; scores are computed from it;
- `gradient`: the same without recomputing, as other programs do it.

Each runs in a process of its own. `temporaries` is what XLA allocates besides arguments and results
(`compiled.memory_analysis()`). `process` is the largest resident size of the process: Python, libraries, loading, weights,
compiler, temporaries; `loaded` is the same before scoring.

2026-11-22, 2 cores, weights of 513 MiB:

    variant          temporaries, MiB  / weights  process, MiB  process / weights  loaded, MiB
    ---------------  ----------------  ---------  ------------  -----------------  -----------
    forward                        51  0.100               952  1.854                      814
    taps                          189  0.368              1232  2.401                      814
    gradient, remat               593  1.156              1753  3.415                      817
    gradient                     3125  6.090              4355  8.486                      810
"""

import dataclasses
import json
import sys
from pathlib import Path

import _common
import tyro

from jaxprune.commands._common import peak_memory

VARIANTS = ("forward", "taps", "gradient, remat", "gradient")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Measures the memory that scoring needs."""

    model: str = "smollm2"
    """Model to score."""
    samples: int = 10
    """Calibration sequences."""
    length: int = 128
    """Tokens in a sequence."""
    json: Path | None = None
    """Write the result to this file, too."""


def program(variant: str, cfg):
    """(params, tokens) -> losses or scores."""
    from jaxprune import models, scorers

    if variant == "forward":
        loss = models.loss_fn(cfg)
        return lambda params, tokens: loss(params, {}, tokens)
    probes = models.probes(cfg)
    if variant == "taps":
        scorer = scorers.taylor(models.loss_fn(cfg))
    else:
        loss = models.loss_fn(cfg, remat=variant == "gradient, remat")
        scorer = scorers.full_taylor(loss, lambda tree: models.sum_over_units(tree, cfg))
    return lambda params, tokens: scorer.finalize(scorer.update(scorer.init(probes), params, probes, tokens))


def measure(variant: str, model: str, samples: int, length: int) -> dict[str, int]:
    """Bytes, in this process."""
    import jax

    from jaxprune import models

    params, cfg = models.load(model, dtype="float32")
    tokens = jax.random.randint(jax.random.key(0), (samples, length), 0, cfg.vocab)
    jax.block_until_ready((params, tokens))
    loaded = peak_memory()
    compiled = jax.jit(program(variant, cfg)).lower(params, tokens).compile()
    jax.block_until_ready(compiled(params, tokens))
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return dict(weights=_common.size(params), temporaries=temporaries, loaded=loaded, process=peak_memory())


def main(args: Args) -> None:
    """Measures every variant in a fresh process and prints the table."""
    rows = []
    for variant in VARIANTS:
        found = _common.in_new_process(__file__, "--measure", variant, args.model, args.samples, args.length)
        rows.append(
            {
                "variant": variant,
                "temporaries, MiB": round(found["temporaries"] / _common.MIB),
                "/ weights": found["temporaries"] / found["weights"],
                "process, MiB": round(found["process"] / _common.MIB),
                "process / weights": found["process"] / found["weights"],
                "loaded, MiB": round(found["loaded"] / _common.MIB),
            }
        )
    title = f"{args.model}, {args.samples} x {args.length} tokens; weights {found['weights'] / _common.MIB:.0f} MiB"
    _common.show(title, rows, args.json, weights=found["weights"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        variant, model, samples, length = sys.argv[2:]
        print(json.dumps(measure(variant, model, int(samples), int(length))))
    else:
        main(tyro.cli(Args))
