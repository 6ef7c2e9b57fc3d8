"""What a compiled program does, counted in its HLO text: matrix products and collectives, as often as loops repeat them.

`cost_analysis` of XLA counts the body of a loop once, and our layers are the turns of a loop.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}  # others 4
COLLECTIVES: dict[str, Callable[[float, int], float]] = {  # (bytes of the result, devices) -> bytes that a device receives
    "all-gather": lambda b, n: b * (n - 1) / n,
    "all-reduce": lambda b, n: 2 * b * (n - 1) / n,  # a reduce-scatter, then an all-gather
    "reduce-scatter": lambda b, n: b * (n - 1),
    "all-to-all": lambda b, n: b * (n - 1) / n,
    "collective-permute": lambda b, n: b,
}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|condition)=%?([\w.-]+)")


class Work(NamedTuple):
    """Of one device.

    Attributes:
      flops: two for each multiplication of its matrix products.
      collectives: kind -> bytes that it receives.
    """

    flops: float
    collectives: dict[str, float]

    def plus(self, other: "Work", times: int = 1) -> "Work":
        """The sum with `times` times the other."""
        kinds = {**self.collectives, **other.collectives}
        both = {k: self.collectives.get(k, 0) + times * other.collectives.get(k, 0) for k in kinds}
        return Work(self.flops + times * other.flops, both)


def count(text: str) -> Work:
    """The work of a compiled program.

    Args:
      text: `jax.stages.Compiled.as_text()`.

    >>> import jax
    >>> from jaxprune import _hlo
    >>> w = jax.ShapeDtypeStruct((5, 8, 8), "float32")
    >>> program = jax.jit(lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0])
    >>> _hlo.count(program.lower(jax.ShapeDtypeStruct((4, 8), "float32"), w).compile().as_text()).flops == 5 * 2 * 4 * 8 * 8
    True
    """
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[2]
            computations[name] = []
            entry = name if match[1] else entry
        elif name:
            computations[name].append(line)
    done: dict[str, Work] = {}

    def work(name: str) -> Work:
        if name not in done:
            done[name] = _sum(computations.get(name, []), work)
        return done[name]

    return work(entry)


def _sum(lines: list[str], work: Callable[[str], Work]) -> Work:
    total, shapes = Work(0.0, {}), dict[str, str]()
    for line in lines:
        if not (match := _OPERATION.match(line)):
            continue
        name, shape, kind, rest = match.groups()
        shapes[name] = shape
        for called in _CALLED.findall(rest):
            total = total.plus(work(called))
        if kind == "while":
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
            total = total.plus(work(re.search(r"body=%?([\w.-]+)", rest)[1]), int(trips[1]) if trips else 1)  # type: ignore[index]
        elif kind == "dot":
            total = total.plus(Work(_dot(shape, rest, shapes), {}))
        elif (plain := kind.removesuffix("-start")) in COLLECTIVES:
            result = shape if plain == kind else _SHAPE.findall(shape)[-1:]  # of the pair (operand, result)
            size = sum(_bytes(*s) for s in (_SHAPE.findall(result) if isinstance(result, str) else result))
            total = total.plus(Work(0.0, {plain: float(COLLECTIVES[plain](size, _group(rest)))}))
    return total


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _bytes(dtype: str, dims: str) -> int:
    return math.prod(_numbers(dims)) * BYTES.get(dtype, 4)


def _dot(shape: str, rest: str, shapes: dict[str, str]) -> float:
    left = re.match(r"(?:(\w+\[[\d,]*\])\S* )?%?([\w.-]+)", rest)
    assert left is not None, rest
    sizes = _numbers(_SHAPE.findall(left[1] or shapes[left[2]])[0][1])
    over = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
    inner = math.prod(sizes[i] for i in _numbers(over[1] if over else ""))
    return 2.0 * inner * math.prod(_numbers(_SHAPE.findall(shape)[0][1]))


def _group(rest: str) -> int:
    """Devices that take part together: `{{0,1},{2,3}}`, `[2,4]<=[8]` or `mesh['a'=2,'b'=4] {'b'}` in HLO text."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(_numbers(listed[1]))
    if grid := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(grid[2])
    if named := re.search(r"replica_groups=mesh\[(.*?)\] *\{(.*?)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])  # an axis, or 'axis':(size before)size of a part of it
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if "source_target_pairs" in rest:
        return 2
    raise ValueError(f"HLO: groups of devices in a form that is not known: {rest}")
