"""Budgets that users set: a size or a speed that the pruned model has to have, and the ratio that leads there."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxprune import evaluate
from jaxprune.models import LlamaConfig, count_parameters

WITHIN = 0.01  # a size is met if it is at most this fraction below the limit
NEAR = 0.05  # a speed is met well enough if it is at most this fraction below the limit
ROUNDS = 3  # of measuring what was chosen by prediction, and choosing again
GRID, CLOSE, AROUND = 17, 1e-6, 0.005  # ratios tried at first, when bisection ends, how far around its end is looked
COUNTS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}
BYTES = {"": 1.0, "B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
SUFFIXES: dict[str, Mapping[str, float]] = dict(parameters=COUNTS, memory=BYTES, flops=COUNTS, latency=TIMES, throughput=COUNTS)


class Target(NamedTuple):
    """What the pruned model may cost at most.

    Attributes:
      what: `parameters`, `memory`, `flops`, `latency` or `throughput`.
      limit: parameters, bytes, FLOPs, or seconds; of a throughput the seconds that its tokens may take.
      cost: of a configuration, in the same unit; lower is better.
      measure: of a configuration, really measured where `cost` predicts; None where `cost` is exact.
      given: what the cost depends on besides the configuration, for the record.
    """

    what: str
    limit: float | int
    cost: Callable[[LlamaConfig], float]
    measure: Callable[[LlamaConfig], float] | None = None
    given: Mapping[str, Any] = {}


class Met(NamedTuple):
    """How a target was met.

    Attributes:
      ratio: that the allocator was given.
      cfg: the shape that it led to.
      cost: of that shape; a prediction where the target is measured.
      measured: what was measured, or None.
      more: units that stay beside what the ratio keeps; 0 unless the steps of the ratio are too coarse.
    """

    ratio: float
    cfg: LlamaConfig
    cost: float | int
    measured: float | None = None
    more: int = 0

    @property
    def reached(self) -> float | int:
        """What was measured, else the cost."""
        return self.cost if self.measured is None else self.measured


def parameters(limit: float | int) -> Target:
    """All parameters that are stored, tied embeddings once.

    >>> from jaxprune import budgets, models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> budgets.parameters(5e3).cost(cfg)
    11872.0
    """
    return Target("parameters", limit, lambda cfg: float(count_parameters(cfg)))


def memory(limit: float | int, dtype: Any = "float32", batch: int = 1, context: int = 1024) -> Target:
    """Bytes of the weights and of a full key/value cache; activations and the program itself are not counted.

    Args:
      limit: bytes.
      dtype: of weights and cache.
      batch: sequences.
      context: tokens in each.
    """
    size = jnp.dtype(dtype).itemsize

    def cost(cfg: LlamaConfig) -> float:
        cached = 2 * batch * context * sum(dims.kv_heads * cfg.sizes(dims)["h"] for dims in cfg.layers)
        return float(size * (count_parameters(cfg) + cached))

    return Target("memory", limit, cost, given=dict(dtype=jnp.dtype(dtype).name, batch=batch, context=context))


def flops(limit: float | int, context: int = 1024) -> Target:
    r"""Floating-point operations that read one token when `context` are in the cache, itself among them.

    .. math:: 2 (P + d v) + \sum_l 4 k_l g_l h\, s

    with P the weights of the matrices of all layers, shortcuts included, :math:`d v` those of the output head and s the keys
    that the token sees, at most the sliding window. A multiplication and an addition are two. Looking up the embedding, norms,
    rotary embeddings, biases, softmax and activation functions are not counted.

    >>> from jaxprune import budgets, models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> budgets.flops(1e4, context=10).cost(cfg) == 2 * (cfg.decoder_parameters + 32 * 64) + 4 * 4 * 8 * 10
    True
    """

    def cost(cfg: LlamaConfig) -> float:
        return float(evaluate.flops_per_token(cfg, context))

    return Target("flops", limit, cost, given=dict(context=context))


def latency(
    limit: float,
    predict: Callable[[LlamaConfig], float],
    measure: Callable[[LlamaConfig], float] | None = None,
    *,
    what: str = "latency",
    given: Mapping[str, Any] | None = None,
) -> Target:
    """Seconds, predicted and then measured; see `jaxprune._block_latency`.

    Args:
      limit: seconds.
      predict: seconds that a configuration should take.
      measure: seconds that it takes, or None to trust the prediction.
      what: `latency` or `throughput`.
      given: for the record.
    """
    return Target(what, limit, predict, measure, given or {})


def amount(text: str, what: str) -> float:
    """A number with a suffix, as `Target.limit` has it.

    Args:
      text: such as `100M`, `200MB` or `20ms`.
      what: as in `Target`; says which suffixes there are.

    Raises:
      ValueError: it is none, or not positive.

    >>> from jaxprune import budgets
    >>> budgets.amount("100M", "parameters"), budgets.amount("1.5 MiB", "memory"), budgets.amount("20ms", "latency")
    (100000000.0, 1572864.0, 0.02)
    """
    suffixes = SUFFIXES[what]
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*([A-Za-z]*)\s*", text, re.ASCII)
    number = float(found[1] + (found[2] or "")) * suffixes.get(found[3], math.nan) if found else math.nan
    if not (math.isfinite(number) and number > 0):
        allowed = ", ".join(filter(None, suffixes)) + (" or none" if "" in suffixes else "")
        raise ValueError(f"{text!r} given; give a positive number with one of the suffixes {allowed}")
    return number


def shown(value: float | int, what: str) -> str:
    """A cost in words.

    >>> from jaxprune import budgets
    >>> budgets.shown(1.2345e8, "parameters"), budgets.shown(0.0123, "latency")
    ('123.45M parameters', '12.30 ms')
    """
    if what in ("latency", "throughput"):
        return f"{value * 1e3:.2f} ms"
    unit = dict(parameters=" parameters", memory="B", flops=" FLOPs")[what]
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f}{' ' if what == 'memory' else ''}{letter}{unit}"
    return f"{value:.0f} {unit.strip()}"


def check(target: Target, cfg: LlamaConfig, smallest: LlamaConfig | None = None) -> None:
    """Refuses a target that needs no pruning, or that none would reach.

    Args:
      target: what to reach.
      cfg: the model.
      smallest: the least that may stay of it, if that is known; not asked where times count, for it need not be the fastest.

    Raises:
      ValueError: see above.
    """
    if (now := target.cost(cfg)) <= target.limit:
        raise ValueError(
            f"target: {shown(target.limit, target.what)} given; the model has {shown(now, target.what)}, so it is met "
            "already; ask for less"
        )
    if smallest is not None and target.measure is None and (least := target.cost(smallest)) > target.limit:
        raise _too_little(target, least)


def meet(
    at: Callable[[float], LlamaConfig],
    target: Target,
    cfg: LlamaConfig,
    *,
    fill: tuple[str, int] | None = None,
    say: Callable[[str], None] = lambda what: None,
) -> Met:
    """The ratio whose configuration comes nearest to a target without exceeding it.

    The first of a grid of ratios that obeys, bisection down to the one before, then a scan around what that found: costs need
    not be monotone, because widths are rounded and a narrower sublayer may take longer. Where the steps are so coarse that more
    than `WITHIN` of the limit is left, layers in turn get units back, as many as fit. What is measured is chosen again by a
    prediction that the measurement corrects, up to `ROUNDS` times.

    Args:
      at: ratio, above 0 and below 1, -> the shape of the pruned model; raises ValueError for ratios that cannot be reached.
      target: what to reach.
      cfg: the model.
      fill: axis letter and number of the units that a layer may get back at a time, or None where all depends on the ratio.
      say: called with what was measured.

    Returns:
      The ratio and its shape. It is over the target only where measured times do not obey.

    Raises:
      ValueError: the target is met already or cannot be reached; the message says what can be.

    >>> import dataclasses
    >>> from jaxprune import budgets, models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 480),) * 2)
    >>> narrow = lambda r: dataclasses.replace(cfg, layers=(models.LayerDims(2, 2, 1 + round(479 * (1 - r))),) * 2)
    >>> budgets.meet(narrow, budgets.parameters(60e3), cfg).cost
    59936.0
    """
    check(target, cfg)
    if target.measure is None:
        return _under(at, target, target.limit, cfg, fill)
    limit, tried = target.limit, list[Met]()
    for number in range(1, ROUNDS + 1):
        met = _under(at, target, limit, cfg, fill, or_least=number > 1)
        if any(met.cfg == before.cfg for before in tried):
            break
        met = met._replace(measured=target.measure(met.cfg))
        tried.append(met)
        predicted, measured = (shown(x, target.what) for x in (met.cost, met.reached))
        say(f"latency, step {number}: ratio {met.ratio:.4f}, {predicted} predicted, {measured} measured")
        if (1 - NEAR) * target.limit <= met.reached <= target.limit:
            break
        limit = met.cost * (1 - NEAR / 5) * target.limit / met.reached
    fast = [met for met in tried if met.reached <= target.limit]
    return max(fast, key=lambda met: met.reached) if fast else min(tried, key=lambda met: met.reached)


def _under(
    at: Callable[[float], LlamaConfig],
    target: Target,
    limit: float | int,
    dense: LlamaConfig,
    fill: tuple[str, int] | None,
    or_least: bool = False,
) -> Met:
    """What comes nearest to a limit from below; where nothing does, an error or what costs least."""
    found: dict[float, Met] = {}

    def cost(ratio: float) -> float:
        if ratio not in found:
            found[ratio] = Met(ratio, cfg := at(ratio), target.cost(cfg))
        return found[ratio].cost

    cost(1e-6)  # what no ratio can do is said here
    top = _most(at)
    grid = [float(ratio) for ratio in np.linspace(1e-6, top, GRID)]
    first = next((i for i, ratio in enumerate(grid) if cost(ratio) <= limit), None)
    if first is None:
        least = min(found.values(), key=lambda met: met.cost)
        if or_least:
            return least
        raise _too_little(target, least.cost)
    low, high = grid[max(first - 1, 0)], grid[first]
    while high - low > CLOSE:
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= limit else (middle, high)
    around = (float(min(max(ratio, 1e-6), top)) for ratio in np.linspace(high - AROUND, high + AROUND, 15))
    near = [ratio for ratio in {*grid[: first + 1], high, *around} if cost(ratio) <= limit]
    best = max((found[ratio] for ratio in near), key=lambda met: (met.cost, -met.ratio))
    return best if fill is None or best.cost >= (1 - WITHIN) * limit else _filled(best, target, limit, dense, *fill)


def _most(at: Callable[[float], LlamaConfig]) -> float:
    """The greatest ratio that can be reached."""

    def possible(ratio: float) -> bool:
        try:
            at(ratio)
        except ValueError:
            return False
        return True

    low, high = 1e-6, 1 - 1e-6
    if possible(high):
        return high
    while high - low > CLOSE:
        middle = (low + high) / 2
        low, high = (middle, high) if possible(middle) else (low, middle)
    return low


def _filled(met: Met, target: Target, limit: float | int, dense: LlamaConfig, axis: str, step: int) -> Met:
    """Gives units back to the layers in turn, as many as the limit affords."""
    name = dict(k="kv_heads", f="ff")[axis]
    have, full = ([getattr(dims, name) for dims in cfg.layers] for cfg in (met.cfg, dense))
    open_ = [i for i, (n, most) in enumerate(zip(have, full, strict=True)) if n < most]

    def with_more(times: int) -> Met:
        rounds, rest = divmod(times, len(open_))
        wider = {i: min(have[i] + step * (rounds + (j < rest)), full[i]) for j, i in enumerate(open_)}
        layers = tuple(dims._replace(**{name: wider.get(i, have[i])}) for i, dims in enumerate(met.cfg.layers))
        cfg = dataclasses.replace(met.cfg, layers=layers)
        return met._replace(cfg=cfg, cost=target.cost(cfg), more=sum(wider.values()) - sum(have[i] for i in open_))

    low, high = 0, len(open_) * max((-(-(full[i] - have[i]) // step) for i in open_), default=0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if with_more(middle).cost <= limit else (low, middle - 1)
    return with_more(low) if low else met


def _too_little(target: Target, least: float | int) -> ValueError:
    return ValueError(
        f"target: {shown(target.limit, target.what)} given; with these layers, units and multiples at least "
        f"{shown(least, target.what)} stay; ask for more, widen --layers or prune more --units"
    )


def notes(target: Target, met: Met) -> tuple[str, ...]:
    """What the user should know of how a target was met."""
    limit, reached = shown(target.limit, target.what), shown(met.reached, target.what)
    said = []
    if met.more:
        said.append(f"target: no ratio leads within {WITHIN:.0%} of {limit}, so layers got {met.more} units back")
    if met.reached > target.limit:
        over, shapes = met.reached / target.limit - 1, len(set(met.cfg.layers))
        why = f"; its layers have {shapes} shapes, fewer (--max-distinct) may be faster" if shapes > 2 else ""
        said.append(f"target: {limit} asked, {reached} measured: {over:.1%} over, the nearest that was found{why}")
    elif target.measure is None and met.reached < (1 - WITHIN) * target.limit:
        said.append(f"target: {limit} asked, {reached} reached: units or multiples are too coarse to come nearer")
    return tuple(said)
