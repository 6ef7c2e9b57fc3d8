"""AdaPruner: Bayesian optimisation of what a Taylor score is computed from, and how."""

import base64
import hashlib
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from jaxprune import surgery
from jaxprune.models import LlamaConfig, Params, PerLayer, unit_counts
from jaxprune.plan import Plan
from jaxprune.search import _study
from jaxprune.search._metrics import ORDERS, Metric, Subset, score, statistics
from jaxprune.search.fitness import Fitness
from jaxprune.search.points import Point

AGGREGATES = ("sum", "max", "prod")  # the mean keeps the order of the sum inside a layer and axis
BASELINE = dict(subset=0, order="first", granularity="element", aggregate="sum")


def adapruner(
    params: Params,
    cfg: LlamaConfig,
    pool: Int[Array, "n t"] | Int[np.ndarray, "n t"],
    fitness: Fitness,
    plan_of: Callable[[PerLayer], Plan],
    *,
    study: Path,
    trials: int = 50,
    subsets: int = 16,
    subset_size: int = 10,
    keep: float = 0.75,
    startup: int = 10,
    seed: int = 0,
    microbatch: int | None = None,
    settings: Mapping[str, Any] | None = None,
    cost: Callable[[Plan], float] | None = None,
    on_trial: Callable[[int, Point], None] = lambda number, point: None,
) -> list[Point]:
    r"""Searches the calibration subset and the importance metric together with a tree-structured Parzen estimator.

    With :math:`E` a Taylor score of elements and :math:`V` one of channels, :math:`n` the division by the mean over a layer and
    axis, and :math:`I_1, I_2` of first and second order, a score is

    .. math:: I_1 = (1-\beta)\,n(E) + \beta\,n(V), \qquad I = (1-\alpha)\,n(I_1) + \alpha\,n(I_2)

    where a weight of 0 or 1 leaves one term as it is. So the four scores of `scorers.taylor` are points of the space, and trial
    0 is `param_first` on the first windows of the pool. A constant for each layer and axis does not change which units go as
    long as units compete inside a layer. In a global ranking a score that is blended counts every layer and axis alike, and
    one that is not keeps LLM-Pruner's raw scale.

    Statistics that add up over windows are computed once a window, the others once a subset, and a plan that came up before is
    not measured again: most trials cost one forward pass of `fitness`.

    The study can be killed at any time. The same call goes on with it, and finds the trials that it would have found (with the
    same release of Optuna on the same kind of device); one with more `trials` goes on from there.

    Args:
      params, cfg: the model.
      pool: windows of calibration text; subset 0 is the first `subset_size`, the others are drawn from the `informative` ones.
      fitness: measures candidates, on text that is neither in the pool nor evaluated on afterwards.
      plan_of: scores -> units that stay. It decides the size, and must give the same plan for the same scores.
      study: SQLite file, for one process at a time.
      trials: in all.
      subsets: how many the search chooses from.
      subset_size: windows in each.
      keep: fraction of the pool that is not dropped.
      startup: random trials before the estimator is asked, trial 0 included.
      seed: of subsets and trials.
      microbatch: sequences that go through a layer at a time; it divides `subset_size`. None is all of them. It moves the
        last bits of scores: `pipeline.divisor` gives those of `pipeline.prune`.
      settings: what else the trials depend on, JSON: a study that was made with another value is refused. Seeds, sizes, the
        pool, the model and what `plan_of` does are compared without being named here; the text of `fitness` is not.
      cost: size of what a plan leaves; None is parameters of the attention and MLP matrices.
      on_trial: called after each new trial.

    Returns:
      All trials in order; the first is the baseline.

    Raises:
      ValueError: a number is out of range, the pool is too small, Optuna is missing, or the study has other settings.
      OSError: the study cannot be written.

    Reference: Kong, Ma, Wang and Zhang, `AdaPruner <https://arxiv.org/abs/2503.06184>`_, AAAI 2025. Known from its abstract and
    reviews of it: both spaces are searched at once, by Bayesian optimisation with a tree-structured Parzen estimator, each step
    measures the pruned model, short texts with little information are left out, and LLM-Pruner's scores are the baseline. No
    code was published, so the rest is a reconstruction: the blends, the fixed subsets, the rule of `informative`, the
    objective, and all numbers.

    >>> import jax, tempfile
    >>> from jaxprune import models, plan
    >>> from jaxprune.search.adapruner import adapruner
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> params, pool = models.init(jax.random.key(0), cfg), jax.numpy.arange(48).reshape(8, 6)
    >>> def fitness(plans):  # stands for `fitness.gate_fitness`
    ...     return np.array([float(p.keep[0]["f"].sum()) for p in plans])
    >>> def half(scores):
    ...     return plan.select(scores, ({"f": 24},))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = adapruner(params, cfg, pool, fitness, half, study=Path(folder) / "study.db", trials=3, subset_size=2)
    >>> found[0].origin, len(found), min(found).loss <= found[0].loss
    ('trial 0: first order, elements, sum, subset 0', 3, True)
    """
    for name, value in dict(trials=trials, subsets=subsets, subset_size=subset_size, startup=startup).items():
        if value < 1:
            raise ValueError(f"{name}: {value} given; it must be at least 1")
    pool = np.asarray(pool)
    drawn = _subsets(pool, subsets, subset_size, keep, seed)
    of, size = statistics(params, cfg, pool, microbatch=microbatch), cost or _decoder_parameters(cfg)

    def objective(trial: Any, done: _study.Trials) -> float:
        subset, metric = _suggest(trial, subsets)
        plan = plan_of(score(lambda kind: of(kind, drawn[subset]), metric))
        trial.set_user_attr("plan", _packed(plan))
        trial.set_user_attr("digest", plan.digest)
        same = [t.value for t in done if t.user_attrs["digest"] == plan.digest]
        return same[0] if same else float(fitness([plan])[0])

    def point(number: int, trial: Any) -> Point:
        plan = _unpacked(trial.user_attrs["plan"])
        return Point(float(trial.value), size(plan), plan, f"trial {number}: {_words(trial.params)}")

    made_with = dict(space=1, seed=seed, subsets=subsets, subset_size=subset_size, keep=keep, startup=startup)
    digests = dict(
        pool=_short(pool.astype(np.int32).tobytes()),
        model=_model_digest(params, cfg),
        allocation=_allocation_digest(plan_of, cfg),
    )
    done = _study.minimize(
        study,
        objective,
        BASELINE,
        trials=trials,
        startup=startup,
        seed=seed,
        settings=dict(settings or {}) | made_with | digests,
        on_trial=lambda number, trial: on_trial(number, point(number, trial)),
    )
    return [point(i, trial) for i, trial in enumerate(done)]


def informative(pool: Int[Array, "n t"] | Int[np.ndarray, "n t"], keep: float = 0.75) -> np.ndarray:
    r"""The windows whose tokens have the highest entropy, :math:`-\sum_v p_v \log p_v` with :math:`p_v` the share of token v.

    AdaPruner leaves out short texts with little information and does not say by what rule. Windows have one length, so a text
    that is shorter never becomes one; repetitions, tables and lists of numbers are what the entropy finds.

    Args:
      pool: token ids.
      keep: fraction of the windows that stay, rounded up.

    Returns:
      Their indices, ascending; of equals the first stay.

    Raises:
      ValueError: `keep` is out of range.

    >>> import numpy as np
    >>> from jaxprune.search import adapruner
    >>> adapruner.informative(np.array([[1, 1, 1], [1, 2, 3], [4, 4, 5]]), 0.6).tolist()
    [1, 2]
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: {keep} given; allowed is more than 0 and at most 1")
    shares = [np.unique(row, return_counts=True)[1] / len(row) for row in np.asarray(pool)]
    entropy = np.round([-(p * np.log(p)).sum() for p in shares], 9)
    return np.sort(np.argsort(-entropy, kind="stable")[: math.ceil(keep * len(entropy))])


def _subsets(pool: np.ndarray, number: int, size: int, keep: float, seed: int) -> list[Subset]:
    """The first windows, then random ones of those with information."""
    rest = informative(pool, keep)
    if (have := len(pool) if number == 1 else len(rest)) < size:
        of = "" if number == 1 else f" of which {have} with enough information"
        raise ValueError(f"pool: {len(pool)} windows given{of}; a subset takes {size}: give more text, or lower subset_size")
    rng = np.random.default_rng(seed)
    drawn = [tuple(sorted(rng.choice(rest, size, replace=False).tolist())) for _ in range(number - 1)]
    return [tuple(range(size)), *drawn]


def _suggest(trial: Any, subsets: int) -> tuple[int, Metric]:
    subset = trial.suggest_categorical("subset", range(subsets))
    order = trial.suggest_categorical("order", ORDERS)
    alpha = trial.suggest_float("alpha", 0, 1) if order == "blend" else 0.0
    beta = 0.0
    if order != "second":
        granularity = trial.suggest_categorical("granularity", ("element", "vector", "both"))
        beta = trial.suggest_float("beta", 0, 1) if granularity == "both" else float(granularity == "vector")
    return subset, Metric(order, alpha, beta, trial.suggest_categorical("aggregate", AGGREGATES))


def _words(chosen: dict[str, Any]) -> str:
    order = f"{chosen['alpha']:.2f} second order" if chosen["order"] == "blend" else f"{chosen['order']} order"
    grains = {"element": "elements, ", "vector": "channels, ", "both": f"{chosen.get('beta', 0):.2f} channels, ", None: ""}
    return f"{order}, {grains[chosen.get('granularity')]}{chosen['aggregate']}, subset {chosen['subset']}"


def _packed(plan: Plan) -> str:
    return base64.b64encode(zlib.compress(plan.to_json().encode())).decode()


def _unpacked(text: str) -> Plan:
    return Plan.from_json(zlib.decompress(base64.b64decode(text)).decode())


def _decoder_parameters(cfg: LlamaConfig) -> Callable[[Plan], float]:
    return lambda plan: surgery.pruned_config(cfg, plan).decoder_parameters


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _model_digest(params: Params, cfg: LlamaConfig) -> str:
    """Of the configuration and of about a thousand numbers from each array."""
    some = jax.jit(lambda tree: jax.tree.map(lambda x: x.reshape(-1)[:: max(1, x.size // 1024)], tree))(params)
    return _short(repr(cfg).encode() + b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(some)))


def _allocation_digest(plan_of: Callable[[PerLayer], Plan], cfg: LlamaConfig) -> str:
    """Of the plan for scores that grow with the index of a unit."""
    rising = tuple({a: np.arange(n, dtype=np.float32) for a, n in layer.items()} for layer in unit_counts(cfg, "kf"))
    return plan_of(rising).digest[:12]
