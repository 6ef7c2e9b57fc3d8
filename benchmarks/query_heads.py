"""What query heads as units would bring at most: the default recipe on a model in which every query head has keys of its own.

Command: python benchmarks/query_heads.py --out DIR --calibration wikitext2.valid.txt --ratio 0.5

The keys and values of a group are repeated for each of its query heads, which changes no logit, and heads are scored one by
one. A head that goes takes its rows of q and o along; k and v count with the last head of a group. Writes the folder `wide` and
`plan.json`, and prints the fraction that really goes; the parameters of `wide` do not say it. Then

  jaxprune prune DIR/wide --plan DIR/plan.json --out small --reconstruct residual --fit-samples 64 --fit-length 1024 \
    --calibration wikitext2.valid.txt
  jaxprune evaluate small --text wikitext2.test.txt --window 1024 128 --max-tokens 16384

Groups keep unequal numbers of heads then, which no runtime loads without repeated keys: it is a bound, not a method.
"""

import dataclasses
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tyro

from jaxprune import data, folder, methods, models, pipeline, scorers
from jaxprune._curves import Item, choose
from jaxprune._progress import progress
from jaxprune.plan import Plan

MULTIPLE = 8  # of channels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Writes a model of single heads and a plan for it."""

    out: Path
    """Folder for `wide` and `plan.json`."""
    calibration: str = "builtin"
    """Text to score on."""
    model: str = "smollm2"
    """Model with several query heads in a group."""
    ratio: float = 0.5
    """Fraction of the attention and MLP matrices of the model itself to remove."""
    seed: int = 0
    """Of the windows and labels."""


def main() -> None:
    """Writes both, and prints what stays."""
    args = tyro.cli(Args)
    model = folder.load(args.model, "float32")
    method, cfg = methods.find(methods.DEFAULT), model.cfg
    params, wide = single_heads(model.params, cfg)
    models.save(args.out / "wide", params, wide, model.tokenizer)
    tokens = data.token_blocks(
        args.calibration, model.tokenizer, samples=method.samples, length=method.length, seed=args.seed
    ).tokens
    batches = pipeline.batches(tokens, params)
    scorer = method.scorer(wide, methods.Options(seed=args.seed, microbatch=len(batches[0])))
    scores = scorers.score(scorer, params, models.probes(wide), progress(batches, "scoring"))
    items, orders = knapsack(scores, cfg, args.ratio, method.min_kept)
    keep: list[dict[str, np.ndarray]] = [{} for _ in cfg.layers]
    for item in items:
        keep[item.layer][item.axis] = np.sort(orders[item.layer][item.axis][item.counts[item.chosen] :])
    (args.out / "plan.json").write_text(Plan(tuple(keep), models.unit_counts(wide)).to_json())
    gone = sum(float(item.parameters[item.chosen]) for item in items)
    print(f"{gone / cfg.decoder_parameters:.4f} of the decoder goes; query heads that stay: {[len(k['k']) for k in keep]}")


def single_heads(params: models.Params, cfg: models.LlamaConfig) -> tuple[models.Params, models.LlamaConfig]:
    """The same model with one query head in each group."""
    out = dict(params)
    for run in cfg.runs:
        arrays = dict(params[run.name])
        layers, d, k, g, h = arrays["q"].shape
        arrays |= dict(q=arrays["q"].reshape(layers, d, k * g, 1, h), o=arrays["o"].reshape(layers, k * g, 1, h, d))
        out[run.name] = arrays | {n: jnp.repeat(arrays[n], g, axis=2) for n in "kv"}
    dims = tuple(x._replace(kv_heads=x.kv_heads * x.q_per_kv, q_per_kv=1) for x in cfg.layers)
    return out, dataclasses.replace(cfg, layers=dims)


def knapsack(
    scores: models.PerLayer, cfg: models.LlamaConfig, ratio: float, floor: float
) -> tuple[list[Item], list[dict[str, np.ndarray]]]:
    """The recipe's allocation with the true cost of a head, and the order in which the units of each layer go."""
    power, head = methods.power(ratio), 2 * cfg.head_dim * cfg.d
    items, orders = [], []
    for i, (layer, dims) in enumerate(zip(scores, cfg.layers, strict=True)):
        order = {a: np.argsort(np.asarray(s), kind="stable") for a, s in layer.items()}
        curve = {a: np.r_[0, np.sort(np.asarray(s, np.float64))] ** power for a, s in layer.items()}
        groups = np.full(dims.kv_heads, dims.q_per_kv)
        costs = [0]
        for unit in order["k"]:
            groups[unit // dims.q_per_kv] -= 1
            costs.append(costs[-1] + head + (0 if groups[unit // dims.q_per_kv] else head))
        items.append(Item(i, "k", np.arange(len(costs)), methods.ATTENTION * curve["k"], np.array(costs, np.float64)))
        most = dims.ff - math.ceil(floor * dims.ff / MULTIPLE) * MULTIPLE
        counts = np.arange(0, most + 1, MULTIPLE)
        items.append(Item(i, "f", counts, curve["f"][counts], 3.0 * cfg.d * counts))
        orders.append(order)
    choose(items, ratio * cfg.decoder_parameters)
    return items, orders


if __name__ == "__main__":
    main()
