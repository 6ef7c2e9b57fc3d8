"""What each ingredient of the default recipe brings: allocations and targets of `kfac-obs` on the same scores.

Command: python benchmarks/default_recipe.py --text wikitext2.valid.txt --other c4_sample.jsonl:text [--ratio 0.5] [--json FILE]

The first 70 % of the text calibrate, its last 25 % measure (at most 12,288 tokens), as does the end of the other text (8,192
tokens), in windows of 1024. The test split is not read.
"""

import dataclasses
import tempfile
from pathlib import Path

import _common
import jax
import tyro

from jaxprune import allocate, data, evaluate, folder, kronecker, models, plan, recovery, scorers, surgery


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Compares the ingredients."""

    text: str = "builtin"
    """Text that is split into calibration and development text: a file, FILE.jsonl:FIELD, builtin."""
    other: str = "builtin-heldout"
    """Text of another domain."""
    model: str = "smollm2"
    """Model to prune."""
    ratio: float = 0.5
    """Fraction of the attention and MLP matrices to remove."""
    samples: int = 64
    """Windows of calibration text."""
    length: int = 512
    """Tokens in a window."""
    json: Path | None = None
    """Write the rows to this file, too."""


VARIANTS = (  # power, attention, floor, target, its ridge, its correction
    (1.0, 1.0, 0.0, "dense", 0.01, 1.0),
    (0.85, 1.0, 0.0, "dense", 0.01, 1.0),
    (1.0, 1.5, 0.27, "none", 0.01, 1.0),
    (1.0, 1.5, 0.27, "dense", 0.01, 1.0),
    (0.85, 1.5, 0.27, "dense", 0.01, 1.0),
    (1.0, 1.5, 0.27, "residual", 0.01, 1.0),
    (1.0, 1.5, 0.27, "residual", 0.06, 0.6),
    (1.0, 1.5, 0.27, "residual", 0.06, (1.0, 0.2)),
)


def main() -> None:
    """Prints a table."""
    args = tyro.cli(Args)
    model = folder.load(args.model, "float32")
    params, cfg = model.params, model.cfg
    text, other = (joined(source) for source in (args.text, args.other))
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "calibration.txt").write_text(text[: int(0.7 * len(text))])
        source = str(Path(place) / "calibration.txt")
        blocks = data.token_blocks(source, model.tokenizer, samples=args.samples, length=args.length, seed=0).tokens
    ends = dict(
        development=evaluate.encode_text(model.tokenizer, text[int(0.75 * len(text)) :])[:12288],
        other=evaluate.encode_text(model.tokenizer, other)[-8192:],
    )
    batches = [blocks[i : i + 4] for i in range(0, len(blocks), 4)]
    curves = scorers.score(kronecker.kronecker_obs(cfg, jax.random.key(0)), params, models.probes(cfg), batches)
    rows = []
    for power, attention, floor, target, damp, correction in VARIANTS:
        constraints = allocate.Constraints(multiple_of=8, min_kept=floor)
        budget = round(args.ratio * cfg.decoder_parameters)
        keep = plan.select(curves, allocate.lagrangian(power, attention)(curves, cfg, budget, constraints))
        small = pruned(params, cfg, keep, batches, target, damp, correction)
        measured = {name: evaluate.perplexity(*small, tokens)["perplexity"] for name, tokens in ends.items()}
        settings = dict(power=power, attention=attention, floor=floor, target=target, ridge=damp, correction=correction)
        rows.append(settings | measured)
        _common.show(f"kfac-obs at {args.ratio}", rows, args.json)


def joined(source: str) -> str:
    """All of a text as one string."""
    text = data.read_text(source)
    return text.separator.join(text.pieces)


def pruned(params, cfg, keep: plan.Plan, batches, target: str, damp: float, correction: float | tuple[float, float]):
    """The pruned model."""
    if target != "none":
        params, cfg = recovery.reconstruct(params, cfg, keep.keep, batches, target=target, damp=damp, correction=correction)
    return surgery.cut(params, cfg, keep)


if __name__ == "__main__":
    main()
