"""Every method on the same model, text and ratio: perplexity after the cut, and what the cut took.

Command: python benchmarks/methods.py [--ratio 0.2] [--json FILE]

Calibration is each method's default on the source `builtin`, ranking is local, perplexity is measured on `builtin-heldout`, in
windows of 1024 and 128 tokens, on the first 8,192 tokens. The README's table is this program's output.
"""

import dataclasses
import json
import time
from pathlib import Path

import tyro

from jaxprune import data, evaluate, folder, methods, pipeline


@dataclasses.dataclass(frozen=True)
class Args:
    """Compares the methods."""

    model: str = "smollm2"
    """Model to prune."""
    ratio: float = 0.2
    """Fraction of the attention and MLP matrices to remove."""
    calibration: str = "builtin"
    """Text to score on."""
    text: str = "builtin-heldout"
    """Text for perplexity."""
    json: Path | None = None
    """Write the rows to this file, too."""


def cases() -> dict[str, dict]:
    """Name -> settings: each method as it is, the Taylor variants, and whole layers."""
    variants = {
        f"taylor, {v}": dict(method="taylor", taylor=v) for v in ("param_first", "param_second", "param_mix", "vectorize")
    }
    others = {name: dict(method=name) for name in ("gate-taylor", "fisher", "magnitude", "magnitude-l1", "random")}
    layers = {f"{name}, whole layers": dict(method=name, units=("layers",)) for name in ("taylor", "first-layers")}
    return variants | {"taylor, global": dict(method="taylor", ranking="global")} | others | layers


def main() -> None:
    """Prints a Markdown table."""
    args = tyro.cli(Args)
    model = folder.load(args.model, "float32")
    text = data.read_text(args.text)
    tokens = evaluate.encode_text(model.tokenizer, text.separator.join(text.pieces))[:8192]
    rows = [dict(method="dense", removed=0.0, seconds=0.0) | _perplexities(model.params, model.cfg, tokens)]
    print("| method | removed | perplexity, 1024 | perplexity, 128 | seconds |\n| --- | --- | --- | --- | --- |", flush=True)
    _show(rows[-1])
    for name, options in cases().items():
        method = methods.find(options["method"])
        blocks = None
        if method.needs != "weights":
            blocks = data.token_blocks(
                args.calibration, model.tokenizer, samples=method.samples, length=method.length, seed=0
            ).tokens
        begin = time.perf_counter()
        pruned = pipeline.prune(model.params, model.cfg, blocks, pipeline.Settings(ratio=args.ratio, **options))
        seconds = time.perf_counter() - begin
        removed = 1 - pruned.cfg.decoder_parameters / model.cfg.decoder_parameters
        rows.append(dict(method=name, removed=removed, seconds=seconds) | _perplexities(pruned.params, pruned.cfg, tokens))
        _show(rows[-1])
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


def _perplexities(params, cfg, tokens) -> dict[str, float]:
    return {str(w): evaluate.perplexity(params, cfg, tokens, window=w)["perplexity"] for w in (1024, 128)}


def _show(row: dict) -> None:
    print(
        f"| {row['method']} | {row['removed']:.1%} | {row['1024']:.1f} | {row['128']:.1f} | {row['seconds']:.0f} |", flush=True
    )


if __name__ == "__main__":
    main()
