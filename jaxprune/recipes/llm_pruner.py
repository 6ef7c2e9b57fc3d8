"""LLM-Pruner's published setting for a 20 % smaller model, in LLM-Pruner's own counting.

Claim: 25 % of the KV groups and MLP channels of every layer but the first four and the last two, element-wise first-order
Taylor importance on 10 sequences of 128 tokens, ranked within each layer (Ma et al., `LLM-Pruner
<https://arxiv.org/abs/2305.11627>`_, 2023, section 4.1 and appendix B.1: layers 4 to 29 of the 32 of LLaMA-7B). The ratio is of
groups in the chosen layers, so fewer than 20 % of the parameters go. `jaxprune prune --protect-first 4 --protect-last 2 --ratio
0.2` keeps the setting and meets the ratio instead.

Command: python -m jaxprune.recipes.llm_pruner smollm2 --out small
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro

from jaxprune import Plan, allocate, cut, data, folder, models, proof, scorers, select
from jaxprune._files import atomic_folder
from jaxprune.commands._common import ModelName


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """LLM-Pruner's published setting.

    Attributes:
      model: see `folder.load`.
      out: folder to write.
      calibration: text source.
      seed: of the calibration windows.
    """

    model: ModelName
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    calibration: Annotated[str, tyro.conf.arg(metavar="SRC")] = "builtin"
    seed: int = 0


def plan(model: folder.Model, tokens, ratio: float = 0.25, first: int = 4, last: int = 2) -> Plan:
    """Which units stay.

    Args:
      model: the dense model.
      tokens: int32[10, 128] calibration tokens.
      ratio: fraction of the groups of each chosen layer that goes.
      first, last: layers at the ends that are left alone.
    """
    cfg = model.cfg
    scorer = scorers.taylor(models.loss_fn(cfg), "param_first")
    scores = scorers.score(scorer, model.params, models.probes(cfg), [tokens])
    constraints = allocate.Constraints(layers=(first, len(cfg.layers) - last))
    return select(scores, allocate.llm_pruner(ratio)(scores, cfg, 0, constraints))


def main() -> None:
    """Prunes by the setting and saves the smaller model."""
    args = tyro.cli(Setting, description=__doc__)
    with atomic_folder(args.out) as out:
        model = folder.load(args.model, "float32")
        calibration = data.token_blocks(args.calibration, model.tokenizer, samples=10, length=128, seed=args.seed)
        keep = plan(model, calibration.tokens)
        small, cfg = cut(model.params, model.cfg, keep)
        report = proof.verify(model.params, model.cfg, small, cfg, keep, calibration.tokens[:2, :64])
        record = dict(
            plan=json.loads(keep.to_json()),
            method=dict(name="recipes.llm_pruner"),
            source=args.model,
            calibration=dict(source=calibration.source, sha256=calibration.sha256, samples=10, length=128),
            seed=args.seed,
            versions=folder.versions(),
            metrics={"largest logit difference, masked and cut": report.difference},
            updates=[],
        )
        folder.save(out, folder.Model(small, cfg, model.tokenizer, str(args.out), record))
    before, after = models.count_parameters(model.cfg), models.count_parameters(cfg)
    print(f"{before:,} parameters before, {after:,} after, exact: {report.exact}")


if __name__ == "__main__":
    main()
