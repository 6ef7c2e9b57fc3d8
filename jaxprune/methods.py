"""The methods that the command line knows by name: a scorer, its calibration, its paper."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxprune import allocate, scorers
from jaxprune.kronecker import kronecker_obs
from jaxprune.models import Config, MambaConfig, PerLayer, loss_fn, max_logits_fn, observe, sum_over_units
from jaxprune.models.mamba_config import only_llama

UNITS = dict(kv="k", mlp="f", inner="i", layers="l", sublayers="kf", hidden="d", rotated="")


class Options(NamedTuple):
    """What a method may read besides the model.

    Attributes:
      taylor: variant of the Taylor score.
      aggregate: how the tensors of a unit are combined, or None for the method's own way.
      seed: of methods that draw random numbers.
      microbatch: sequences that go through a layer at a time.
      units: axis letters to score.
    """

    taylor: str = "param_first"
    aggregate: str | None = None
    seed: int = 0
    microbatch: int | None = None
    units: str = "kf"


class Method(NamedTuple):
    """A published method as the command line knows it.

    Attributes:
      summary: one line.
      paper: where it was published.
      needs: what it reads: weights, activations or gradients.
      scorer: (configuration, options) -> scorer; None for one that rotates the residual stream instead.
      samples, length: calibration of the paper: sequences and tokens in each.
      units: unit names that it can score.
      ranking: how its paper spreads the budget, a name in `RANKINGS`.
      reconstruct: what its paper fits the weights that stay to, a name in `recovery.TARGETS`, or none.
      min_kept: every MLP keeps at least this fraction of its channels.
      fit_samples, fit_length: calibration of the reconstruction; 0 takes that of the scores.
      sequential: a layer is scored on what the pruned layers before it pass on, where widths are known before scores.
      by_layers: its state is large, and its scorer takes probes of a few layers alone.
    """

    summary: str
    paper: str
    needs: str
    scorer: Callable[[Config, Options], scorers.Scorer] | None
    samples: int = 10
    length: int = 128
    units: tuple[str, ...] = ("kv", "mlp", "layers")
    ranking: str = "local"
    reconstruct: str = "none"
    min_kept: float = 0.0
    fit_samples: int = 0
    fit_length: int = 0
    sequential: bool = False
    by_layers: bool = False


def _random(cfg: Config, options: Options) -> scorers.Scorer:
    del cfg
    return scorers.random(jax.random.key(options.seed))


def _magnitude(p: int, cfg: Config, options: Options) -> scorers.Scorer:
    return scorers.magnitude(lambda tree: sum_over_units(tree, cfg, options.units), p, options.aggregate or "mean")


def _taylor(cfg: Config, options: Options) -> scorers.Scorer:
    loss, how = loss_fn(cfg, microbatch=options.microbatch), options.aggregate or "sum"
    if "d" in options.units:
        return scorers.full_taylor(loss, lambda tree: sum_over_units(tree, cfg, options.units), options.taylor, how)
    return scorers.taylor(loss, options.taylor, how)


def _first_layers(cfg: Config, options: Options) -> scorers.Scorer:
    del options
    return scorers.earliest(len(cfg.layers))


def _observed(make: Callable[..., scorers.Scorer], **given: Any) -> Callable[[Config, Options], scorers.Scorer]:
    """A method whose scorer reads activations alone."""
    return lambda cfg, options: make(functools.partial(observe, cfg=only_llama(cfg, "observe")), **given)


def _kfac_obs(cfg: Config, options: Options) -> scorers.Scorer:
    return kronecker_obs(only_llama(cfg, "kfac-obs"), jax.random.key(options.seed))


def _nirvana(cfg: Config, options: Options) -> scorers.Scorer:
    return scorers.nirvana(max_logits_fn(cfg, microbatch=options.microbatch))


def _ntk(cfg: Config, options: Options) -> scorers.Scorer:
    return scorers.ntk_gates(max_logits_fn(cfg, microbatch=options.microbatch))


def _curvature(cfg: Config, options: Options) -> scorers.Scorer:
    return scorers.curvature(loss_fn(cfg, microbatch=options.microbatch), seed=options.seed, exact="k")


def _hywia(cfg: Config, options: Options) -> scorers.Scorer:
    return scorers.hywia(loss_fn(cfg, microbatch=options.microbatch), aggregate=options.aggregate or "sum")


def power(ratio: float) -> float:
    """Of `kfac-obs`. Losses of sublayers add up less than they should when little goes: it grows with what goes."""
    return min(0.75 + 0.5 * ratio, 1.0)


def _lagrangian(scores: PerLayer, cfg: Config, budget: int, constraints: allocate.Constraints) -> Any:
    return allocate.lagrangian(power(budget / cfg.decoder_parameters), ATTENTION)(scores, cfg, budget, constraints)


def _standardized(scores: PerLayer, *rest: Any) -> Any:
    return allocate.global_(scorers.standardize()(scores), *rest)


RANKINGS: dict[str, allocate.Allocator] = {
    "local": allocate.local,
    "global": allocate.global_,
    "standardized": _standardized,
    "gamma": allocate.gamma(3.36),
    "linear": allocate.depth("linear"),
    "log": allocate.depth("log"),
    "lagrangian": _lagrangian,
    "sensitivity": allocate.lagrangian(),
}
WITHOUT_SCORES = ("local", "linear", "log")  # rankings whose widths do not depend on the scores

DEFAULT = "kfac-obs"
ATTENTION = 1.5  # factor of `kfac-obs` on losses of attentions
GATED = ("kv", "mlp", "layers", "inner")
ALL = (*GATED, "hidden")

METHODS: dict[str, Method] = {
    "kfac-obs": Method(
        "ours: second-order loss of removing units and re-fitting the others, budget by loss, least squares",
        "this library; after van der Ouderaa et al., The LLM Surgeon, 2024, arXiv:2312.17244",
        "gradients",
        _kfac_obs,
        samples=32,
        length=512,
        units=("kv", "mlp"),
        ranking="lagrangian",
        reconstruct="residual",
        min_kept=0.27,
        fit_samples=64,
        fit_length=1024,
        by_layers=True,
    ),
    "taylor": Method(
        "weight times gradient, summed over a unit (LLM-Pruner); --taylor chooses the variant",
        "Ma et al., LLM-Pruner, 2023, arXiv:2305.11627",
        "gradients",
        _taylor,
        units=ALL,
    ),
    "gate-taylor": Method(
        "derivative of the loss by a gate on the unit",
        "Molchanov et al., Importance Estimation for Neural Network Pruning, 2019, arXiv:1906.10771",
        "gradients",
        lambda cfg, options: scorers.gate_taylor(loss_fn(cfg, microbatch=options.microbatch)),
        units=GATED,
    ),
    "fisher": Method(
        "mean square, over sequences, of the derivative by a gate on the unit",
        "Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018, arXiv:1801.05787",
        "gradients",
        lambda cfg, options: scorers.fisher(loss_fn(cfg, microbatch=options.microbatch)),
        units=GATED,
        samples=32,
    ),
    "magnitude": Method(
        "sum of squared weights of a unit",
        "Li et al., Pruning Filters for Efficient ConvNets, 2017, arXiv:1608.08710",
        "weights",
        functools.partial(_magnitude, 2),
        units=ALL,
    ),
    "magnitude-l1": Method(
        "sum of absolute weights of a unit",
        "Li et al., Pruning Filters for Efficient ConvNets, 2017, arXiv:1608.08710",
        "weights",
        functools.partial(_magnitude, 1),
        units=ALL,
    ),
    "first-layers": Method(
        "keeps the first layers of the model (LLM-Pruner's layer-wise mode)",
        "Ma et al., LLM-Pruner, 2023, arXiv:2305.11627",
        "weights",
        _first_layers,
        units=("layers",),
    ),
    "nirvana": Method(
        "weight times gradient of the mean of the largest logits; KV groups and channels ranked apart",
        "Ai et al., NIRVANA, 2025, arXiv:2509.14230",
        "gradients",
        _nirvana,
        samples=32,
        ranking="gamma",
    ),
    "ntk": Method(
        "ours: how much the neural tangent kernel of the gates changes when a unit goes",
        "this library; after Ai et al., NIRVANA, 2025, arXiv:2509.14230",
        "gradients",
        _ntk,
        samples=32,
        units=("kv", "mlp"),
        ranking="gamma",
    ),
    "curvature": Method(
        "first and second derivative of the loss by a gate on the unit, exact for KV groups, Hutchinson's for channels",
        "LeCun et al., Optimal Brain Damage, 1990, with gates; Hutchinson, 1990",
        "gradients",
        _curvature,
        units=("kv", "mlp"),
    ),
    "hywia": Method(
        "fine and coarse Taylor scores, fused by attention in each layer (fusion reconstructed)",
        "Liu et al., HyWIA, 2024, arXiv:2403.10799",
        "gradients",
        _hywia,
        units=("kv", "mlp"),
    ),
    "flap": Method(
        "fluctuation of a unit's activation times its weights, ranked globally; bias compensation",
        "An et al., FLAP, 2024, arXiv:2312.11983",
        "activations",
        _observed(scorers.fluctuation),
        samples=1024,
        ranking="global",
        reconstruct="bias",
        units=("kv", "mlp"),
    ),
    "wanda-sp": Method(
        "weight magnitude times input norm, summed over a unit, layer after pruned layer",
        "An et al., FLAP, 2024, arXiv:2312.11983, after Sun et al., Wanda, 2023, arXiv:2306.11695",
        "activations",
        _observed(scorers.wanda),
        samples=128,
        units=("kv", "mlp"),
        sequential=True,
    ),
    "llm-bip": Method(
        "change of the block's output when a unit goes (reconstructed from the abstract)",
        "Wu, LLM-BIP, 2024, arXiv:2412.06419",
        "activations",
        _observed(scorers.llm_bip),
        samples=128,
        units=("kv", "mlp"),
    ),
    "numerical": Method(
        "relaxed mask by Newton's method in closed form, ranked globally; least-squares compensation",
        "Shen et al., Numerical Pruning, 2024, arXiv:2412.12441",
        "activations",
        _observed(scorers.numerical),
        samples=32,
        length=512,
        ranking="global",
        reconstruct="weights",
        units=("kv", "mlp"),
    ),
    "shortgpt": Method(
        "cosine between a layer's input and output; removes whole layers",
        "Men et al., ShortGPT, 2024, arXiv:2403.03853",
        "activations",
        _observed(scorers.block_influence),
        samples=64,
        length=256,
        units=("layers",),
    ),
    "sublayers": Method(
        "cosine between a sublayer's input and output; removes whole attentions and MLPs",
        "He et al., What Matters in Transformers?, 2024, arXiv:2406.15786",
        "activations",
        _observed(scorers.block_influence, sublayers=True),
        samples=64,
        length=256,
        units=("sublayers",),
    ),
    "slicegpt": Method(
        "rotates the residual stream to its principal components and removes the last ones",
        "Ashkboos et al., SliceGPT, 2024, arXiv:2401.15024",
        "activations",
        None,
        samples=64,
        length=512,
        units=("rotated",),
    ),
    "random": Method("random units: what every method must beat", "-", "weights", _random, units=ALL),
}


def check_layers_at_once(method: str, n: int | None) -> None:
    """Raises ValueError unless a method can score so many layers at a time; None is all of them."""
    if n is None:
        return
    if not find(method).by_layers:
        able = ", ".join(name for name, m in METHODS.items() if m.by_layers)
        raise ValueError(f"layers_at_once: {n} given; {method} keeps few numbers of a layer, leave it out; it is for {able}")
    if n < 1:
        raise ValueError(f"layers_at_once: {n} given; ask for at least 1")


def find(name: str) -> Method:
    """The method of that name.

    Raises:
      ValueError: there is none.
    """
    if name not in METHODS:
        raise ValueError(f"method: {name!r} given; allowed are {', '.join(METHODS)} (see `jaxprune methods`)")
    return METHODS[name]


def default_units(name: str, cfg: Config | None = None) -> tuple[str, ...]:
    """KV groups and MLP channels, of Mamba its inner channels, or what the method scores instead.

    Raises:
      ValueError: the method cannot score a Mamba.
    """
    units = find(name).units
    if isinstance(cfg, MambaConfig):
        if "inner" not in units:
            able = ", ".join(method for method, found in METHODS.items() if "inner" in found.units)
            raise ValueError(f"method: {name} given, which does not score the inner channels of Mamba; choose one of {able}")
        return ("inner",)
    return ("kv", "mlp") if {"kv", "mlp"} <= set(units) else units[:1]
