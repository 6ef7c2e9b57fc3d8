"""A plan says which units stay: it is what scores, budgets and hand-written files turn into before anything is cut."""

import dataclasses
import hashlib
import json
from typing import Any, TypeAlias

import numpy as np

from jaxprune.models import Config, PerLayer, unit_counts

Widths: TypeAlias = PerLayer  # of int: units to keep
AXES = "kfihd"


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The kept units of every layer: immutable, sorted, equal and hashed by content.

    Attributes:
      keep: per layer, axis letter (`k` KV group, `h` rotary pair of all heads, `f` MLP channel, `i` inner channel of Mamba,
        `d` residual channel) -> sorted int64 indices. An absent letter keeps everything; an empty array removes the sublayer.
        `d` is the same in every layer or absent.
      sizes: per layer, axis letter -> number of units of the model that the plan is for.

    Raises:
      ValueError: indices out of range or repeated, or residual channels that differ between layers; the layer is named.

    >>> from jaxprune import plan
    >>> p = plan.Plan(({"f": [2, 0]},), ({"f": 4},))
    >>> p.keep[0]["f"].tolist(), plan.Plan.from_json(p.to_json()) == p
    ([0, 2], True)
    """

    keep: PerLayer
    sizes: PerLayer

    def __post_init__(self):
        if len(self.keep) != len(self.sizes):
            raise ValueError(
                f"plan: {len(self.keep)} layers in `keep` and {len(self.sizes)} in `sizes`; give one entry for each layer"
            )
        layers = tuple(
            {a: _indices(i, a, x, size) for a, x in sorted(keep.items())}
            for i, (keep, size) in enumerate(zip(self.keep, self.sizes, strict=True))
        )
        if len({layer["d"].tobytes() if "d" in layer else None for layer in layers}) > 1:
            raise ValueError("plan: axis d: every layer must keep the same residual channels, because they share one stream")
        object.__setattr__(self, "keep", layers)
        object.__setattr__(self, "sizes", tuple(dict(sorted(s.items())) for s in self.sizes))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def digest(self) -> str:
        """SHA-256 of the content, in hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The plan as one line of JSON."""
        keep = [{a: x.tolist() for a, x in layer.items()} for layer in self.keep]
        return json.dumps(dict(version=1, sizes=list(self.sizes), keep=keep))

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Reads what `to_json` wrote.

        Raises:
          ValueError: the text is not a plan.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as e:
            raise ValueError(f"plan: not JSON ({e}); give a file that jaxprune wrote, or its `plan` entry") from None
        return Plan.from_dict(data)

    @staticmethod
    def from_dict(data: Any) -> "Plan":
        """Reads the decoded JSON of a plan.

        Raises:
          ValueError: the data is not a plan.
        """
        if not isinstance(data, dict) or data.get("version") != 1:
            raise ValueError("plan: not a version 1 plan; give an object with the keys version, sizes and keep")
        for key in ("sizes", "keep"):
            if not isinstance(data.get(key), list) or not all(isinstance(layer, dict) for layer in data[key]):
                raise ValueError(f"plan: {key!r} must be a list with one object for each layer")
        if any(type(n) is not int for layer in data["sizes"] for n in layer.values()):
            raise ValueError("plan: 'sizes' must hold whole numbers")
        return Plan(tuple(data["keep"]), tuple(data["sizes"]))

    def check(self, cfg: Config) -> None:
        """Raises ValueError unless the plan is for a model of this shape."""
        units = "".join(a for a in AXES if any(a in s for s in self.sizes))
        if self.sizes != (want := tuple(dict(sorted(c.items())) for c in unit_counts(cfg, units))):
            where = next((i for i, (a, b) in enumerate(zip(self.sizes, want, strict=False)) if a != b), None)
            if where is None:
                raise ValueError(
                    f"plan: made for {len(self.sizes)} layers, the model has {len(want)}; use the plan of this model"
                )
            raise ValueError(
                f"plan: made for another model: layer {where} has {self.sizes[where]} units in the plan and {want[where]} "
                "in the model; use the plan of this model"
            )

    def then(self, second: "Plan") -> "Plan":
        """The plan that does what this one and then `second`, on its result, do.

        Raises:
          ValueError: `second` is not for the result of this one; the layer is named.

        >>> from jaxprune import plan
        >>> first, second = plan.Plan(({"f": [0, 2, 3]},), ({"f": 4},)), plan.Plan(({"f": [1, 2]},), ({"f": 3},))
        >>> first.then(second).keep[0]["f"].tolist()
        [2, 3]
        """
        if len(self.keep) != len(second.keep):
            raise ValueError(f"plan: {len(self.keep)} layers are followed by a plan for {len(second.keep)}")
        keep = []
        sizes = tuple(left | size for size, left in zip(self.sizes, second.sizes, strict=True))
        for i, (layer, more, size) in enumerate(zip(self.keep, second.keep, sizes, strict=True)):
            old = {a: layer.get(a, np.arange(size[a])) for a in layer.keys() | more.keys()}
            for a in more:
                if len(old[a]) != second.sizes[i][a]:
                    raise ValueError(
                        f"plan: layer {i}: axis {a}: {len(old[a])} units are left, the plan that follows is for "
                        f"{second.sizes[i][a]}"
                    )
            keep.append({a: x[more[a]] if a in more else x for a, x in old.items()})
        return Plan(tuple(keep), sizes)


def _indices(layer: int, axis: str, given: Any, size: dict[str, int]) -> np.ndarray:
    if axis not in size:
        raise ValueError(f"plan: layer {layer}: axis {axis!r} given; this layer has {sorted(size)}")
    x = np.asarray(given)
    x = x.astype(np.int64) if x.shape == (0,) else x
    if x.ndim != 1 or x.dtype.kind not in "iu":
        raise ValueError(f"plan: layer {layer}: axis {axis}: kept units must be a list of whole numbers")
    x = np.sort(x.astype(np.int64))
    if len(x) and (x[0] < 0 or x[-1] >= size[axis]):
        raise ValueError(
            f"plan: layer {layer}: axis {axis}: unit {x[0] if x[0] < 0 else x[-1]} given; allowed are 0 to {size[axis] - 1}"
        )
    if len(np.unique(x)) != len(x):
        raise ValueError(f"plan: layer {layer}: axis {axis}: a unit is listed twice; list each kept unit once")
    x.flags.writeable = False
    return x


def select(scores: PerLayer, widths: Widths) -> Plan:
    """Keeps the units with the highest scores; ties go to the lower index.

    Args:
      scores: per layer, axis letter -> float32[units].
      widths: per layer, axis letter -> how many to keep. Letters that are absent are not pruned.

    Raises:
      ValueError: more units asked for than there are, or scores that are not numbers; the layer is named.

    >>> import numpy as np
    >>> from jaxprune import plan
    >>> plan.select(({"f": np.array([1.0, 3.0, 2.0])},), ({"f": 2},)).keep[0]["f"].tolist()
    [1, 2]
    """
    keep = []
    for i, (layer, width) in enumerate(zip(scores, widths, strict=True)):
        chosen = {}
        for axis, n in width.items():
            s = np.asarray(layer[axis])
            if not np.isfinite(s).all():
                raise ValueError(
                    f"layer {i}: axis {axis}: scores contain NaN or infinity; check the weights and the calibration data"
                )
            if not 0 <= n <= len(s):
                raise ValueError(f"layer {i}: cannot keep {n} of {len(s)} units on axis {axis}; ask for at most {len(s)}")
            chosen[axis] = np.argsort(-s, kind="stable")[:n]
        keep.append(chosen)
    return Plan(tuple(keep), tuple({a: len(s) for a, s in layer.items()} for layer in scores))
