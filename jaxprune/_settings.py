"""What a plan depends on besides the model and the calibration tokens."""

import dataclasses
import math

from jaxprune import allocate, methods, recovery
from jaxprune._constraints import CHANNELS
from jaxprune.models import Config, MambaConfig, export, unit_counts

MAMBA_RANKINGS = ("local", "global", "standardized", "linear", "log")
ROOM = 0.8  # a method's own floor is left out where the budget takes more than this part of what the floor lets go


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a plan depends on besides the model and the calibration tokens.

    Attributes:
      method: a name in `methods.METHODS`.
      ratio: fraction of the parameters of the attention and MLP matrices of all layers to remove, in (0, 1).
      units: names of the units that may go: `kv` and `mlp`, or `layers`, or `sublayers`, or `hidden`; of Mamba
        `inner`.
      ranking: how the budget is spread over layers, a name in `methods.RANKINGS`, or None for the method's own.
      reconstruct: what the weights that stay are fitted to, a name in `recovery.TARGETS` or `none`, or None for the method's
        own.
      layers: layers that may be pruned, half-open, or None for all.
      protect_first, protect_last: layers at the ends that are left alone.
      layers_at_once: layers that are scored at a time, each time from all tokens, or None for all; for methods whose statistics
        are large.
      steps: times that the model is scored and cut, towards the ratio in equal steps.
      multiple_of: MLP widths that change are multiples of this.
      kv_multiple_of: numbers of KV groups that change are multiples of this.
      min_kept: every MLP keeps at least this fraction of its channels, or None for the method's own, which gives way to
        budgets that leave it no room.
      max_distinct: at most this many different layer shapes, or None.
      profile: the result can be exported so, a name in `models.export.PROFILES`; then `multiple_of` becomes a multiple of what
        the profile wants, and all layers get one shape where it wants that.
      taylor, aggregate: see `methods.Options`.
      seed: of random numbers.
    """

    method: str = methods.DEFAULT
    ratio: float = 0.2
    units: tuple[str, ...] = ("kv", "mlp")
    ranking: str | None = None
    reconstruct: str | None = None
    layers: tuple[int, int] | None = None
    protect_first: int = 0
    protect_last: int = 0
    layers_at_once: int | None = None
    steps: int = 1
    multiple_of: int = 8
    kv_multiple_of: int = 1
    min_kept: float | None = None
    max_distinct: int | None = None
    profile: str | None = None
    taylor: str = "param_first"
    aggregate: str | None = None
    seed: int = 0

    def __post_init__(self):
        method = methods.find(self.method)
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio: {self.ratio} given; allowed is between 0 and 1, both excluded")
        if self.ranking is not None and self.ranking not in methods.RANKINGS:
            raise ValueError(f"ranking: {self.ranking!r} given; allowed are {', '.join(methods.RANKINGS)}")
        if self.reconstruct is not None and self.reconstruct not in ("none", *recovery.TARGETS):
            raise ValueError(f"reconstruct: {self.reconstruct!r} given; allowed are none, {', '.join(recovery.TARGETS)}")
        if self.target is not None and {"hidden", "rotated"} & set(self.units):
            raise ValueError(
                f"reconstruct: {self.target} given; there is none for the residual stream's channels; set it to none"
            )
        allocate.Constraints(  # refuses what makes no sense
            multiple_of=self.multiple_of, kv_multiple_of=self.kv_multiple_of, min_kept=self.min_kept or 0.0
        )
        methods.check_layers_at_once(self.method, self.layers_at_once)
        for name in ("steps", "max_distinct"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"{name}: {number} given; ask for at least 1")
        if self.protect_first < 0 or self.protect_last < 0:
            raise ValueError(
                f"protect: {self.protect_first} first and {self.protect_last} last layers given; ask for 0 or more"
            )
        unknown = set(self.units) - methods.UNITS.keys()
        if unknown or not self.units:
            raise ValueError(f"units: {','.join(self.units)!r} given; allowed are {', '.join(methods.UNITS)}")
        if self.units == ("rotated",) and self.steps > 1:
            raise ValueError(f"steps: {self.steps} given; the residual stream is rotated once: leave it out")
        if len(self.units) > 1 and not set(self.units) <= {"kv", "mlp"}:
            raise ValueError(
                f"units: {','.join(self.units)} given; only kv and mlp go together; prune the result again for the others"
            )
        if not set(self.units) <= set(method.units):
            raise ValueError(
                f"units: {self.method} cannot score {', '.join(sorted(set(self.units) - set(method.units)))}; "
                f"it scores {', '.join(method.units)}: set --units"
            )

        if self.profile is not None:
            self._fit_profile(export.find(self.profile))

    def _fit_profile(self, profile: export.Profile) -> None:
        widths = set(self.units) <= {"kv", "mlp"}
        if widths:
            object.__setattr__(self, "multiple_of", math.lcm(self.multiple_of, profile.multiple_of))
        if not (widths and profile.uniform):
            return
        if self.max_distinct not in (None, 1) or self.protect_first or self.protect_last or self.layers:
            raise ValueError(
                f"for: {self.profile} given, whose layers are all equal; leave out --layers, --protect-first, --protect-last "
                "and --max-distinct, or choose a profile of any widths (hf-custom, gguf)"
            )
        object.__setattr__(self, "max_distinct", 1)

    def check(self, cfg: Config) -> None:
        """Raises ValueError unless a model has the units that these settings are about, and can be pruned so."""
        mamba = isinstance(cfg, MambaConfig)
        if mamba != (self.units == ("inner",)):
            allowed = "inner" if mamba else ", ".join(name for name in methods.UNITS if name != "inner")
            raise ValueError(f"units: {','.join(self.units)} given; a model of family {cfg.family} has {allowed}")
        if not mamba:
            return
        if self.allocation not in MAMBA_RANKINGS:
            raise ValueError(f"ranking: {self.allocation} given; for Mamba there are {', '.join(MAMBA_RANKINGS)}")
        for name in ("target", "max_distinct", "profile"):
            if (value := getattr(self, name)) is not None:
                flag = dict(target="reconstruct", profile="for").get(name, name)
                raise ValueError(f"{flag}: {value} given, which is for LLaMA-family models; leave it out for Mamba")

    @property
    def allocation(self) -> str:
        """How the budget is spread."""
        return self.ranking or methods.find(self.method).ranking

    @property
    def target(self) -> str | None:
        """What is reconstructed, or None."""
        name = methods.find(self.method).reconstruct if self.reconstruct is None else self.reconstruct
        return None if name == "none" else name

    def constraints(self, cfg: Config) -> allocate.Constraints:
        """The layers and units of a model that may go; every step towards the ratio has those of the dense model."""
        n = len(cfg.layers)
        start, stop = self.layers or (0, n)
        start = max(start, self.protect_first)
        stop = min(stop, n - self.protect_last) if self.protect_last else stop
        letters = "".join(methods.UNITS[u] for u in self.units)
        constraints = allocate.Constraints(
            layers=(start, stop),
            units=letters if set(letters) <= set("kfi") else "kf",
            multiple_of=self.multiple_of,
            kv_multiple_of=self.kv_multiple_of,
            min_kept=self.min_kept or 0.0,
            channels=tuple(sum(n for a, n in layer.items() if a in CHANNELS) for layer in unit_counts(cfg)),
        )
        own = dataclasses.replace(constraints, min_kept=methods.find(self.method).min_kept)
        room = ROOM * allocate.reachable(cfg, own) >= self.ratio * cfg.decoder_parameters
        return own if self.min_kept is None and room else constraints
