"""The loop of an evolutionary search: vary, measure, keep the best; each generation is a checkpoint."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from jaxprune import _hosts
from jaxprune._json import write_json
from jaxprune.models._safetensors import read_json
from jaxprune.plan import Plan
from jaxprune.search.points import Point, front

Candidate: TypeAlias = Any  # a plan, or levels of a database


class Problem(NamedTuple):
    """What evolves.

    Attributes:
      losses: candidates -> float[candidates]; lower is better.
      vary: (best candidates so far, best first, or none; generator) -> new candidates, all of an allowed size.
      cost: size of a candidate.
      plan: what it keeps.
      encode, decode: to and from what JSON can hold.
    """

    losses: Callable[[Sequence[Candidate]], np.ndarray]
    vary: Callable[[Sequence[Candidate], np.random.Generator], list[Candidate]]
    cost: Callable[[Candidate], float]
    plan: Callable[[Candidate], Plan]
    encode: Callable[[Candidate], Any]
    decode: Callable[[Any], Candidate]


class Found(NamedTuple):
    """The best candidates, best first, with their losses, and everything that was measured."""

    best: list[tuple[float, Candidate]]
    points: list[Point]


def evolve(
    problem: Problem,
    *,
    generations: int,
    keep: int,
    seed: int,
    settings: dict[str, Any],
    checkpoint: Path | None = None,
    on_generation: Callable[[int, Found], None] = lambda generation, found: None,
) -> Found:
    """Evolves candidates. Generation 0 is what `vary` makes of no parents.

    Random numbers of a generation depend on `seed` and its number alone, so a search that goes on from a checkpoint finds what
    it would have found without the interruption. No candidate is measured twice.

    Args:
      problem: see there.
      generations: after generation 0.
      keep: best candidates that the next generation comes from.
      seed: of random numbers.
      settings: all that the result depends on; a checkpoint of others is refused.
      checkpoint: file that the first process writes after each generation and all go on from if it is there, or None.
      on_generation: called after each with its number and what was found.

    Raises:
      ValueError: the checkpoint is of another search, or generation 0 has no candidate.
    """
    done = -1
    found: Found = Found([], [])
    state = read_json(checkpoint) if checkpoint is not None and _hosts.stands(checkpoint) else None
    if state is not None:
        changed = sorted(k for k in settings.keys() | state["settings"].keys() if settings.get(k) != state["settings"].get(k))
        if changed:
            raise ValueError(f"{checkpoint}: of a search with other settings ({', '.join(changed)}); name another folder")
        done, found = state["generation"], _decoded(state, problem)
    for generation in range(done + 1, generations + 1):
        rng = np.random.default_rng([seed, generation])
        parents = [candidate for _, candidate in found.best]
        candidates = problem.vary(parents, rng)
        known = {_key(problem.encode(c)) for c in parents}
        fresh = list({_key(problem.encode(c)): c for c in candidates if _key(problem.encode(c)) not in known}.values())
        if not (fresh or parents):
            raise ValueError("search: no candidate of the asked size was found; widen the space or allow other sizes")
        losses = problem.losses(fresh) if fresh else np.zeros(0)
        pairs = sorted([*found.best, *zip(losses.tolist(), fresh, strict=True)], key=lambda pair: pair[0])[:keep]
        made = [
            Point(x, problem.cost(c), problem.plan(c), f"generation {generation}") for x, c in zip(losses, fresh, strict=True)
        ]
        found = Found(pairs, _light([*found.points, *made]))
        if checkpoint is not None:
            _hosts.by_first(write_json, checkpoint, _encoded(found, problem, generation, settings))
        on_generation(generation, found)
    return found


def _key(encoded: Any) -> str:
    return repr(encoded)


def _light(points: list[Point]) -> list[Point]:
    """Points that are beaten stay beaten: their plans go."""
    on_front = {id(p) for p in front(points)}
    return [p if id(p) in on_front else p._replace(plan=None) for p in points]


def _encoded(found: Found, problem: Problem, generation: int, settings: dict[str, Any]) -> dict[str, Any]:
    points = [[p.loss, p.cost, None if p.plan is None else p.plan.to_json(), p.origin] for p in found.points]
    return dict(generation=generation, settings=settings, best=[[x, problem.encode(c)] for x, c in found.best], points=points)


def _decoded(state: dict[str, Any], problem: Problem) -> Found:
    points = [
        Point(float(x), cost, None if plan is None else Plan.from_json(plan), origin)
        for x, cost, plan, origin in state["points"]
    ]
    return Found([(float(x), problem.decode(c)) for x, c in state["best"]], points)
