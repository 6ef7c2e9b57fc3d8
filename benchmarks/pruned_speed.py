"""Speed of pruned models against the dense one: forward pass and decoding with a key/value cache.

    python benchmarks/pruned_speed.py [--model smollm2] [--repeats 5] [--json FILE]

The model is pruned at 0.2 and 0.5 of its decoder parameters as `jaxprune prune --method taylor --protect-first 4
--protect-last 2` does (local ranking). All models stand in one process and run in turn; medians. `forward` is the logits of
1 x 1024 tokens. `decode` is one token after another behind a prompt of 128 tokens, greedy, the prompt's own time left out.
`(processor)` is the same ratio in processor time of all cores, which other programs disturb less.

2026-11-22, 2 cores that other programs used as well (load 7), `--repeats 3`:

    model       parameters  decoder / dense  MiB  forward, s  speedup  (processor)  decode, tokens/s  speedup   (processor)
    ----------  ----------  ---------------  ---  ----------  -------  -----------  ----------------  --------  ------------
    dense        134515008  1.000            513  3.274       1.000    1.000        15.618            1.000     1.000
    pruned 0.2   113281344  0.800            432  2.765       1.184    1.174        22.305            1.428     1.782
    pruned 0.5    81320256  0.499            310  1.535       2.133    1.590        25.776            1.650     2.069
"""

import dataclasses
from pathlib import Path

import _common
import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Measures how much faster pruned models run."""

    model: str = "smollm2"
    """Model to prune."""
    ratios: tuple[float, ...] = (0.2, 0.5)
    """Fractions of the decoder parameters to remove."""
    calibration: str = "builtin"
    """Text to score on."""
    tokens: int = 1024
    """Tokens of the forward pass."""
    prompt: int = 128
    """Tokens before the decoded ones."""
    new_tokens: int = 64
    """Tokens that are decoded."""
    repeats: int = 5
    """Rounds that count, after one that does not."""
    json: Path | None = None
    """Write the result to this file, too."""


def decoding(params, cfg, prompt, n: int) -> _common.Spent:
    """What n tokens cost after the first one, which ends the reading of the prompt."""
    from jaxprune.models import decode

    tokens = decode.stream(params, cfg, prompt, max_new_tokens=n + 1)
    next(tokens)
    return _common.spent(lambda: list(tokens))


def main(args: Args) -> None:
    """Prunes, measures all models in turn and prints the table."""
    import jax

    from jaxprune import models, pipeline

    params, cfg = models.load(args.model, dtype="float32")
    blocks = _common.calibration(args.calibration, args.model, 10, 128)
    zoo = {"dense": (params, cfg)}
    for ratio in args.ratios:
        settings = pipeline.Settings(method="taylor", ratio=ratio, protect_first=4, protect_last=2)
        pruned = pipeline.prune(params, cfg, blocks, settings)
        zoo[f"pruned {ratio:g}"] = (pruned.params, pruned.cfg)

    tokens = jax.random.randint(jax.random.key(0), (1, args.tokens), 0, cfg.vocab)
    forward = jax.jit(models.apply, static_argnames="cfg")
    found: dict[str, list] = {name: [] for name in zoo}
    for _ in range(args.repeats + 1):
        for name, (p, c) in zoo.items():
            reading = _common.spent(lambda p=p, c=c: forward(p, tokens, c))
            found[name].append((reading, decoding(p, c, tokens[:, : args.prompt], args.new_tokens)))
    medians = {name: [_common.median(t) for t in zip(*rounds[1:], strict=True)] for name, rounds in found.items()}
    rows = []
    for name, (p, c) in zoo.items():
        reading, decoded = medians[name]
        reading_dense, decoded_dense = medians["dense"]
        rows.append(
            {
                "model": name,
                "parameters": models.count_parameters(c),
                "decoder / dense": c.decoder_parameters / cfg.decoder_parameters,
                "MiB": round(_common.size(p) / _common.MIB),
                "forward, s": reading.clock,
                "speedup": reading_dense.clock / reading.clock,
                "(processor)": reading_dense.processor / reading.processor,
                "decode, tokens/s": args.new_tokens / decoded.clock,
                "speedup ": decoded_dense.clock / decoded.clock,
                "(processor) ": decoded_dense.processor / decoded.processor,
            }
        )
    title = f"{args.model}, forward 1 x {args.tokens}, decode {args.new_tokens} after {args.prompt}, median of {args.repeats}"
    _common.show(title, rows, args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
