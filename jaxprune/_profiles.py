"""Export profiles as constraints: what pruning may lead to, refused before anything is computed."""

import dataclasses
from typing import TYPE_CHECKING

from jaxprune import _narrow, surgery
from jaxprune.models import Config, LayerDims, LlamaConfig, export
from jaxprune.models.mamba_config import only_llama
from jaxprune.plan import Plan

if TYPE_CHECKING:
    from jaxprune._settings import Settings


def check(model: Config, settings: "Settings", plan: Plan | None = None) -> None:
    """Refuses what may lead to a model that `settings.profile` cannot hold.

    Args:
      model: what to prune.
      settings: what to do.
      plan: what to keep, where that is known.

    Raises:
      ValueError: it cannot hold one of the shapes that may come out.

    >>> from jaxprune import Settings, _profiles, models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 2)
    >>> _profiles.check(cfg, Settings(profile="hf"))
    """
    if settings.profile is None:
        return
    cfg = only_llama(model, "for")
    if settings.target == "bias":
        cfg = dataclasses.replace(cfg, biases=tuple(dict.fromkeys((*cfg.biases, "o", "down"))))
    for shape in _may_become(cfg, settings) if plan is None else [surgery.pruned_config(cfg, plan)]:
        if problems := export.find(settings.profile).problems(shape):
            what = "this plan leads" if plan else f"{settings.method} on {','.join(settings.units)} may lead"
            raise ValueError(f"for: {settings.profile} given, and {what} to a model that it cannot hold: {problems[0]}")


def _may_become(cfg: LlamaConfig, settings: "Settings") -> list[LlamaConfig]:
    """Shapes that stand for all that may come out: layers that differ, or one shape for each number of KV groups."""
    if (at := _narrow.narrower(cfg, settings)) is not None:
        return [at(max(cfg.d - 8, 8))]
    last = cfg.layers[-1]
    if settings.units == ("layers",):
        ends = [LayerDims(0, 0, 0)]
    elif settings.units == ("sublayers",):
        ends = [last._replace(kv_heads=0, q_per_kv=0), last._replace(ff=0)]
    elif settings.max_distinct == 1:
        groups = range(1, last.kv_heads + 1) if "kv" in settings.units else [last.kv_heads]
        return [dataclasses.replace(cfg, layers=(last._replace(kv_heads=n),) * len(cfg.layers)) for n in groups]
    else:
        ends = [last._replace(kv_heads=min(last.kv_heads, 1), ff=max(1, last.ff - settings.multiple_of))]
    return [dataclasses.replace(cfg, layers=(*cfg.layers[:-1], end)) for end in ends]
