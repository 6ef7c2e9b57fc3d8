"""Allocations by a published rule of counting."""

import math
from collections.abc import Callable

import numpy as np

from jaxprune._blocks import blocks, spend
from jaxprune._constraints import CHANNELS, Constraints, check, full_widths, removed
from jaxprune.models import Config, PerLayer, unit_costs
from jaxprune.models.mamba_config import only_llama
from jaxprune.plan import Widths


def whole_layers(scores: PerLayer, cfg: Config, budget: int, constraints: Constraints) -> Widths:
    """Removes whole decoder layers, those whose units' scores have the lowest sum.

    Args:
      scores: per layer, axis letter -> float32[units]; axis `l` stands for the whole layer.
      cfg: the model.
      budget: parameters to remove; met as nearly as whole layers allow.
      constraints: which layers may go.

    Raises:
      ValueError: the budget would remove every layer that may go.

    >>> import numpy as np
    >>> from jaxprune import allocate, models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(1, 1, 2),) * 2)
    >>> scores = ({"k": np.ones(1), "f": np.ones(2)}, {"k": np.zeros(1), "f": np.ones(2)})
    >>> allocate.whole_layers(scores, cfg, cfg.decoder_parameters // 2, allocate.Constraints())
    ({'k': 1, 'f': 2}, {'k': 0, 'f': 0})
    """
    widths, costs, chosen = full_widths(cfg), unit_costs(cfg), constraints.chosen(cfg)
    totals = {i: sum(float(np.sum(x)) for x in scores[i].values()) for i in chosen if widths[i]}
    lowest = sorted(totals, key=lambda i: (totals[i], i))
    for i in spend(budget, ((sum(costs[i][a] * n for a, n in widths[i].items()), i) for i in lowest)):
        widths[i] = dict.fromkeys(widths[i], 0)
    if not any(n for layer in widths for n in layer.values()):
        raise ValueError(f"budget: removing {budget} parameters given, which is every layer; lower --ratio")
    return tuple(widths)


def llm_pruner(ratio: float) -> Callable[..., Widths]:
    """LLM-Pruner's own counting: `ratio` of the groups of each chosen layer, whatever parameters that removes.

    The kept channels are truncated, heads are rounded down to whole ones, and the budget is not read.

    Args:
      ratio: fraction of KV groups and of MLP channels, in (0, 1).

    Raises:
      ValueError: ratio outside (0, 1).

    Reference: Ma et al., `LLM-Pruner <https://arxiv.org/abs/2305.11627>`_, 2023, as its released code counts. Where that code
    stops with an error (fewer channels than one head), no head is removed.

    >>> from jaxprune import allocate, models
    >>> cfg = models.LlamaConfig(vocab=32000, d=4096, head_dim=128, layers=(models.LayerDims(32, 1, 11008),) * 32)
    >>> widths = allocate.llm_pruner(0.25)((), cfg, 0, allocate.Constraints(layers=(4, 30)))
    >>> widths[4], cfg.decoder_parameters - allocate.removed(cfg, widths)
    ({'k': 24, 'f': 8256}, 5160566784)
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio: {ratio} given; allowed is between 0 and 1, both excluded")

    def allocate(scores: PerLayer, cfg: Config, budget: int, constraints: Constraints) -> Widths:
        del scores, budget
        widths, h = full_widths(cfg), only_llama(cfg, "llm_pruner").head_dim
        for i in constraints.chosen(cfg):
            for a, n in widths[i].items():
                size = h if a == "k" else 1
                drop = (n * size - int(n * size * (1 - ratio))) // size
                if a in constraints.units and drop < n:
                    widths[i][a] = n - drop
        return tuple(widths)

    return allocate


def sublayers(scores: PerLayer, cfg: Config, budget: int, constraints: Constraints) -> Widths:
    """Removes whole attentions and whole MLPs, those with the lowest mean score first.

    Args:
      scores: per layer, axis letter -> float32[units].
      cfg: the model.
      budget: parameters to remove; met as nearly as whole sublayers allow.
      constraints: which layers and units may go.

    Raises:
      ValueError: the budget would remove everything.

    Reference: He et al., `What Matters in Transformers? <https://arxiv.org/abs/2406.15786>`_, 2024, section 3.2, there with a
    number of attentions or MLPs instead of a budget.

    >>> import numpy as np
    >>> from jaxprune import allocate, models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(1, 1, 11),) * 2)
    >>> scores = ({"k": np.ones(1), "f": np.ones(11)}, {"k": np.zeros(1), "f": np.ones(11)})
    >>> allocate.sublayers(scores, cfg, cfg.decoder_parameters // 4, allocate.Constraints())
    ({'k': 1, 'f': 11}, {'k': 0, 'f': 11})
    """
    widths, costs = full_widths(cfg), unit_costs(cfg)
    items = [(float(np.mean(scores[i][a])), i, a) for i in constraints.chosen(cfg) for a in widths[i] if a in constraints.units]
    for i, a in spend(budget, ((costs[i][a] * widths[i][a], (i, a)) for _, i, a in sorted(items))):
        widths[i][a] = 0
    if not any(n for layer in widths for n in layer.values()):
        raise ValueError(f"budget: removing {budget} parameters given, which is every sublayer; lower --ratio")
    return tuple(widths)


def gamma(factor: float = 3.36) -> Callable[..., Widths]:
    r"""MLP channels go `factor` times as readily as KV groups, each kind ranked over all layers.

    With A and M the parameters of attentions and MLPs and s the fraction to remove, the fraction of KV groups that go is
    :math:`s (A + M) / (A + \gamma M)`, rounded down to whole groups; the channels make up the rest of the budget.

    Args:
      factor: gamma; 1 takes equal fractions.

    Raises:
      ValueError: a factor that is not positive.

    Reference: Ai et al., `NIRVANA <https://arxiv.org/abs/2509.14230>`_, 2025, as the released code counts (3.36 for
    Llama-3.1-8B, 3 for Llama-3.2-3B). There a layer that loses every group keeps its last one; here its best. Multiples of 8
    are reached by giving back whole multiples, so the budget is met.

    >>> import numpy as np
    >>> from jaxprune import allocate, models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(4, 1, 48),) * 2)
    >>> scores = tuple({"k": np.arange(4.0) + i, "f": np.arange(48.0) + 9 * i} for i in range(2))
    >>> allocate.gamma(1.0)(scores, cfg, cfg.decoder_parameters // 2, allocate.Constraints())
    ({'k': 1, 'f': 19}, {'k': 3, 'f': 29})
    """
    if factor <= 0:
        raise ValueError(f"gamma: {factor} given; it must be positive")

    def allocate(scores: PerLayer, cfg: Config, budget: int, constraints: Constraints) -> Widths:
        check(cfg, budget, constraints)
        widths, costs = full_widths(cfg), unit_costs(cfg)
        held = {a: sum(costs[i][a] * widths[i].get(a, 0) for i in constraints.chosen(cfg) if a in costs[i]) for a in "kf"}
        left = budget
        if set("kf") <= set(constraints.units):
            fraction = budget / (held["k"] + factor * held["f"])
            groups = [(float(x), i) for i in constraints.chosen(cfg) for x in np.asarray(scores[i].get("k", ()))]
            lost = [i for _, i in sorted(groups)[: int(fraction * len(groups) + 1e-9)]]
            for i in set(lost):
                kept = constraints.groups(n := widths[i]["k"], lost.count(i))
                widths[i]["k"] = kept
                left -= costs[i]["k"] * (n - kept)
        axis = "f" if "f" in constraints.units else "k"
        lowest = blocks(scores, widths, cfg, constraints, axis)
        for i, a, n in spend(left, ((costs[i][a] * n, (i, a, n)) for i, a, n in lowest)):
            widths[i][a] -= n
        return tuple(widths)

    return allocate


def depth(schedule: str = "linear", slope: float = 0.5) -> Callable[..., Widths]:
    r"""Later layers lose more: a fraction that grows with depth, the same for both kinds of units of a layer.

    With :math:`x_l \in [0, 1]` the depth of layer l among the chosen ones, the removed fraction is proportional to
    :math:`1 + c (2 x_l - 1)` (`linear`) or :math:`1 - c + 2 c \log_2(1 + x_l)` (`log`).

    Args:
      schedule: `linear` or `log`.
      slope: c, in [0, 1]; 0 treats layers alike.

    Raises:
      ValueError: unknown schedule, or a slope outside [0, 1].

    >>> from jaxprune import allocate, models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(4, 1, 48),) * 3)
    >>> [w["f"] for w in allocate.depth("linear", 1.0)((), cfg, cfg.decoder_parameters // 4, allocate.Constraints(units="f"))]
    [48, 25, 3]
    """
    if schedule not in ("linear", "log"):
        raise ValueError(f"schedule: {schedule!r} given; allowed are linear and log")
    if not 0 <= slope <= 1:
        raise ValueError(f"slope: {slope} given; allowed is from 0 to 1")

    def weight(x: float) -> float:
        return 1 + slope * (2 * x - 1) if schedule == "linear" else 1 - slope + 2 * slope * math.log2(1 + x)

    def allocate(scores: PerLayer, cfg: Config, budget: int, constraints: Constraints) -> Widths:
        del scores
        check(cfg, budget, constraints)
        full, costs, chosen = full_widths(cfg), unit_costs(cfg), constraints.chosen(cfg)
        weights = {i: weight((i - chosen.start) / max(len(chosen) - 1, 1)) for i in chosen}

        def at(scale: float) -> list[dict[str, int]]:
            widths = [dict(w) for w in full]
            for i in chosen:
                fraction = min(scale * weights[i], 1.0)
                layer = {a: n for a, n in full[i].items() if a in constraints.units}
                left = fraction * sum(costs[i][a] * n for a, n in layer.items())
                if n := layer.get("k"):
                    drop = int(fraction * n + 1e-9) if "f" in layer else round(fraction * n)
                    widths[i]["k"] = constraints.groups(n, drop)
                    left -= costs[i]["k"] * (n - widths[i]["k"])
                for a in layer.keys() & set(CHANNELS):
                    n, step = layer[a], constraints.multiple_of
                    kept = round((n - left / costs[i][a]) / step) * step
                    widths[i][a] = min(max(kept, constraints.fewest(a, n, i)), n)
            return widths

        low, high = 0.0, float(len(chosen)) * 4
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if removed(cfg, tuple(at(middle))) < budget else (low, middle)
        return tuple(min((at(low), at(high)), key=lambda w: abs(removed(cfg, tuple(w)) - budget)))

    return allocate
