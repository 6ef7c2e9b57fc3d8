"""What an allocation may do, and what it removes."""

import dataclasses
import math

from jaxprune.models import Config, unit_costs, unit_counts
from jaxprune.plan import Widths

CHANNELS = "fi"  # axis letters of single channels, which go in multiples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraints:
    """What an allocation may do.

    Attributes:
      layers: layers that may be pruned, half-open; None is all.
      units: axis letters that may be pruned.
      multiple_of: MLP widths, and inner widths of Mamba, that change are multiples of this.
      kv_multiple_of: numbers of KV groups that change are multiples of this.
      min_kept: every MLP keeps at least this fraction of its channels.
      channels: what `min_kept` is a fraction of, channels per layer; None is what the layers have.
    """

    layers: tuple[int, int] | None = None
    units: str = "kf"
    multiple_of: int = 1
    kv_multiple_of: int = 1
    min_kept: float = 0.0
    channels: tuple[int, ...] | None = None

    def __post_init__(self):
        if not 0 <= self.min_kept < 1:
            raise ValueError(f"min_kept: {self.min_kept} given; allowed is 0 or more and less than 1")
        for name in ("multiple_of", "kv_multiple_of"):
            if (number := getattr(self, name)) < 1:
                raise ValueError(f"{name}: {number} given; ask for at least 1")
        if not self.units or set(self.units) - set("kf") and self.units not in ("i", "h", "hf"):
            raise ValueError(
                f"units: {self.units!r} given; allowed are k (KV groups), f (MLP channels) or both; h (rotary pairs) or hf; "
                "i (of Mamba)"
            )

    def chosen(self, cfg: Config) -> range:
        """The layers that may be pruned.

        Raises:
          ValueError: the range is empty or leaves the model.
        """
        n = len(cfg.layers)
        start, stop = self.layers or (0, n)
        if not 0 <= start < stop <= n:
            raise ValueError(
                f"layers: {start}:{stop} given; this model has layers 0:{n}; give a range inside it that is not empty"
            )
        return range(start, stop)

    def step(self, axis: str) -> int:
        """What widths on an axis are multiples of."""
        return dict(k=self.kv_multiple_of, h=1).get(axis, self.multiple_of)

    def groups(self, have: int, drop: int) -> int:
        """KV groups that a layer keeps which could lose `drop` of them: a multiple, or all."""
        return min(max(math.ceil((have - drop) / self.kv_multiple_of), 1) * self.kv_multiple_of, have)

    def fewest(self, axis: str, have: int, layer: int) -> int:
        """The least number of units that a layer with `have` of them keeps on an axis: a multiple, at least one."""
        if axis == "k":
            return self.groups(have, have)
        if axis == "h":
            return min(1, have)
        step, whole = self.multiple_of, self.channels[layer] if self.channels else have
        return min(max(step, math.ceil(self.min_kept * whole / step) * step), have)


def reachable(cfg: Config, constraints: Constraints) -> int:
    """The most parameters that can be removed."""
    costs = unit_costs(cfg)
    return sum(
        costs[i][a] * (n - constraints.fewest(a, n, i))
        for i in constraints.chosen(cfg)
        for a, n in full_widths(cfg)[i].items()
        if a in constraints.units
    )


def full_widths(cfg: Config) -> list[dict[str, int]]:
    """Units of the model, per layer and axis letter, `k` before `f`."""
    return [dict(layer) for layer in unit_counts(cfg)]


def check(cfg: Config, budget: int, constraints: Constraints) -> None:
    """Raises ValueError if the budget is more than can be removed."""
    most = reachable(cfg, constraints)
    if budget > most:
        raise ValueError(
            f"budget: removing {budget / cfg.decoder_parameters:.1%} of the decoder given; with these layers, units and "
            f"multiples at most {most / cfg.decoder_parameters:.1%} can go; lower --ratio, widen --layers or prune more --units"
        )


def removed(cfg: Config, widths: Widths) -> int:
    """Parameters of attention and MLP matrices that an allocation removes."""
    costs, full = unit_costs(cfg), full_widths(cfg)
    return sum(costs[i][a] * (full[i][a] - n) for i, layer in enumerate(widths) for a, n in layer.items())
