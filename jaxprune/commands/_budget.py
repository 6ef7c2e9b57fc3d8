"""Budgets on the command line: a size or a speed to reach, in place of a ratio."""

import dataclasses
from typing import Annotated, Any, Literal

from jaxprune import _block_latency, _narrow, budgets, pipeline
from jaxprune._progress import progress
from jaxprune.commands._common import flag, say
from jaxprune.models import LlamaConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """A size or a speed to reach, at most one of them, in place of --ratio. Sizes are met from below, to 1 %."""

    target_params: Annotated[str | None, flag("N", "none")] = None
    """Parameters in all, such as 100M or 1.2B; tied embeddings count once."""
    target_memory: Annotated[str | None, flag("BYTES", "none")] = None
    """Weights in --dtype and the key/value cache of --batch x --context tokens, such as 200MB or 1.5GiB."""
    target_flops: Annotated[str | None, flag("N", "none")] = None
    """Operations for one token with --context tokens in the cache, such as 150M: two for each weight of a matrix that is used,
    head included, and those of the attention."""
    target_latency: Annotated[str | None, flag("TIME", "none")] = None
    """Time of the --phase, measured on this device, such as 20ms."""
    target_throughput: Annotated[str | None, flag("N", "none")] = None
    """Tokens a second in the --phase, measured on this device."""
    batch: Annotated[int, flag("N")] = 1
    """Sequences that are read at once."""
    context: Annotated[int, flag("T")] = 1024
    """Tokens of a sequence in the cache."""
    phase: Literal["prefill", "decode"] = "decode"
    """What is timed: prefill reads --context tokens, decode is one step with a cache of that length."""


NAMES = dict(params="parameters", memory="memory", flops="flops", latency="latency", throughput="throughput")


def asked(flags: Budget) -> tuple[str, float] | None:
    """What to reach, a name as in `budgets.Target`, and the number in its unit; None where nothing is asked for.

    Raises:
      ValueError: a flag cannot be used, or there are two of them.
    """
    texts = {name: text for name in NAMES if (text := getattr(flags, f"target_{name}")) is not None}
    if len(texts) > 1:
        raise ValueError(f"targets: {' and '.join(f'--target-{n}' for n in texts)} given; give one of them")
    for name in ("batch", "context"):
        if (value := getattr(flags, name)) < 1:
            raise ValueError(f"{name}: {value} given; it must be at least 1")
    for name, text in texts.items():
        try:
            return NAMES[name], budgets.amount(text, NAMES[name])
        except ValueError as error:
            raise ValueError(f"target_{name}: {error}") from None
    return None


def check(flags: Budget, settings: pipeline.Settings, *, ratio: float | None, plan: Any = None) -> None:
    """Refuses a target beside what says otherwise how much to prune.

    Raises:
      ValueError: it stands beside a ratio, a plan or several steps, or it cannot be read.
    """
    if asked(flags) is None:
        return
    for name, value in dict(ratio=ratio, plan=plan).items():
        if value is not None:
            raise ValueError(f"{name}: {value} given together with a target; leave one of them out")
    pipeline.check_steps(settings)


def goal(flags: Budget, cfg: LlamaConfig, settings: pipeline.Settings, dtype: str) -> budgets.Target | None:
    """The target that the flags ask for; a time is measured by sublayers first, if that was not done before.

    Raises:
      ValueError: it is met already or cannot be reached.
    """
    if (found := asked(flags)) is None:
        return None
    what, limit = found
    if what == "parameters":
        target = budgets.parameters(limit)
    elif what == "memory":
        target = budgets.memory(limit, dtype, flags.batch, flags.context)
    elif what == "flops":
        target = budgets.flops(limit, flags.context)
    else:
        target = _timed(what, limit, cfg, settings, _block_latency.Conditions(flags.phase, flags.batch, flags.context, dtype))
    pipeline.check_goal(cfg, settings, target)
    return target


def _timed(
    what: str, limit: float, cfg: LlamaConfig, settings: pipeline.Settings, when: _block_latency.Conditions
) -> budgets.Target:
    at = _narrow.narrower(cfg, settings)
    table = _block_latency.cached(cfg, when, at=at, say=say, progress=progress)
    say(f"the dense model takes {table.dense * 1e3:.2f} ms, {when.tokens / table.dense:.1f} tokens/s")
    return budgets.latency(
        when.tokens / limit if what == "throughput" else limit,
        lambda small: _block_latency.predicted(table, cfg, small),
        lambda small: _block_latency.seconds(small, when),
        what=what,
        given=when._asdict(),
    )


def rows(target: budgets.Target, met: budgets.Met, cfg: LlamaConfig) -> dict[str, Any]:
    """What the command prints of a target and how it was met."""
    timed, before = target.what in ("latency", "throughput"), target.cost(cfg)
    unit = dict(memory="bytes", parameters="parameters", flops="FLOPs a token").get(target.what, "ms")
    factor = 1e3 if timed else 1

    def number(x: float) -> float | int:
        return round(x * factor, 3) if timed else round(x)

    out: dict[str, Any] = {f"target, {unit}": number(target.limit)}
    if target.what != "parameters":  # which the table has anyway
        out[f"before, {unit}"] = number(before)
    if timed:
        out[f"predicted, {unit}"] = number(met.cost)
        out[f"measured, {unit}"] = number(met.reached)
        tokens = _block_latency.Conditions(**target.given).tokens
        out |= {f"{n}, tokens/s": round(tokens / x, 2) for n, x in (("target", target.limit), ("measured", met.reached))}
    else:
        out[f"reached, {unit}"] = number(met.reached)
    return out | {"ratio found": round(met.ratio, 6)}


def recorded(target: budgets.Target, met: budgets.Met, cfg: LlamaConfig) -> dict[str, Any]:
    """What the record says of it: numbers in the units of `budgets.Target`."""
    return dict(
        what=target.what, limit=target.limit, before=target.cost(cfg), cost=met.cost, measured=met.measured, ratio=met.ratio,
        more=met.more, **target.given,
    )  # fmt: skip
