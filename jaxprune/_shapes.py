"""Few distinct layer shapes: compile time follows their number, because equal neighbours share one scanned body."""

from jaxprune.allocate import Constraints, full_widths, removed
from jaxprune.models import LlamaConfig, unit_costs
from jaxprune.plan import Widths


def merge(widths: Widths, cfg: LlamaConfig, budget: int, constraints: Constraints, most: int) -> Widths:
    """Merges the most similar layer shapes until at most `most` are left, then spends what that left of the budget.

    Shapes are merged pairwise by Ward's criterion on removed parameters, to the mean of their layers' widths; whole groups of
    layers are then widened or narrowed by one multiple of MLP channels while that comes nearer to the budget.

    Args:
      widths: what an allocator returned.
      cfg: the model.
      budget: parameters to remove.
      constraints: what the allocator was given; layers that it leaves alone keep their shapes, which count.
      most: distinct shapes allowed, at least 1.

    Raises:
      ValueError: the layers left alone already use up the shapes, or layers that lack a sublayer would have to be merged.

    >>> from jaxprune import allocate, models, _shapes
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(1, 1, 48),) * 3)
    >>> widths = ({"k": 1, "f": 16}, {"k": 1, "f": 20}, {"k": 1, "f": 48})
    >>> _shapes.merge(widths, cfg, allocate.removed(cfg, widths), allocate.Constraints(), 2)
    ({'k': 1, 'f': 18}, {'k': 1, 'f': 18}, {'k': 1, 'f': 48})
    """
    chosen = constraints.chosen(cfg)
    fixed = {tuple(w.items()) for i, w in enumerate(widths) if i not in chosen}
    groups: dict[tuple, list[int]] = {}
    for i in chosen:
        groups.setdefault(tuple(widths[i].items()), []).append(i)
    groups = {shape: members for shape, members in groups.items() if shape not in fixed}
    if most < 1 or (groups and most <= len(fixed)):
        raise ValueError(
            f"max_distinct: {most} given, and the layers left alone already have {len(fixed)} shapes; "
            f"ask for at least {len(fixed) + 1}"
        )
    while len(groups) > most - len(fixed):
        pair = _nearest(groups, unit_costs(cfg)[chosen[0]])
        if pair is None:
            raise ValueError(
                f"max_distinct: {most} given, and layers that lack a sublayer cannot be merged with others; "
                f"ask for at least {len(fixed) + len(groups)}"
            )
        members = groups.pop(pair[0]) + groups.pop(pair[1])
        mean = {a: sum(widths[i][a] for i in members) / len(members) for a in widths[members[0]]}
        merged = {a: _round(x, a, full_widths(cfg)[members[0]][a], constraints, members) for a, x in mean.items()}
        widths = tuple(merged if i in members else w for i, w in enumerate(widths))
        groups.setdefault(tuple(merged.items()), []).extend(members)
    return _spend_rest(widths, list(groups.values()), cfg, budget, constraints)


def _nearest(groups: dict[tuple, list[int]], cost: dict[str, int]) -> tuple | None:
    shapes = sorted(groups)
    pairs = [(p, q) for n, p in enumerate(shapes) for q in shapes[n + 1 :] if dict(p).keys() == dict(q).keys()]

    def price(pair):
        (p, q), (a, b) = map(dict, pair), (len(groups[x]) for x in pair)
        return sum((cost[axis] * (p[axis] - q[axis])) ** 2 for axis in p) * a * b / (a + b)

    return min(pairs, key=price, default=None)


def _round(x: float, axis: str, full: int, constraints: Constraints, layers: list[int]) -> int:
    step = constraints.step(axis)
    return min(max(round(x / step) * step, _fewest(axis, full, constraints, layers)), full)


def _fewest(axis: str, full: int, constraints: Constraints, layers: list[int]) -> int:
    return max(constraints.fewest(axis, full, i) for i in layers)


def _spend_rest(widths: Widths, groups: list[list[int]], cfg: LlamaConfig, budget: int, constraints: Constraints) -> Widths:
    if "f" not in constraints.units:
        return widths
    full = full_widths(cfg)
    while True:
        gap = budget - removed(cfg, widths)
        step = constraints.multiple_of * (1 if gap < 0 else -1)
        candidates = []
        for members in groups:
            n, most = widths[members[0]].get("f", 0), full[members[0]].get("f", 0)
            if n and _fewest("f", most, constraints, members) <= n + step <= most:
                candidates.append(tuple(w | {"f": n + step} if i in members else w for i, w in enumerate(widths)))
        best = min(candidates, key=lambda w: abs(budget - removed(cfg, w)), default=widths)
        if abs(budget - removed(cfg, best)) >= abs(gap):
            return widths
        widths = best
