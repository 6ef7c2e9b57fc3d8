"""Compressed sublayers for every width, so that a candidate of a search is a choice of rows and nothing is cut or compiled."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune._beside import home, spread
from jaxprune._constraints import Constraints, full_widths
from jaxprune._losses import Progress
from jaxprune.models import LlamaConfig, Params, PerLayer, loss_fn, observe
from jaxprune.models._mesh import on_host
from jaxprune.models.axes import OUTPUT
from jaxprune.plan import Plan, Widths
from jaxprune.recovery import nested_least_squares
from jaxprune.scorers._sites import grams
from jaxprune.search.fitness import over_devices
from jaxprune.sharding import on_mesh

Levels: TypeAlias = PerLayer  # of int: which of a sublayer's counts is taken
Losses: TypeAlias = Callable[[Sequence[Levels], Any], np.ndarray]


class Database(NamedTuple):
    """The output projections of every sublayer at every width that a search may choose.

    Attributes:
      counts: per layer, axis letter -> int[levels], units kept, descending from all of them.
      plans: per layer, axis letter -> the kept units of each level.
      weights: run name -> array name -> [layers, levels, units..., d], zeros where nothing is kept.
    """

    counts: PerLayer
    plans: PerLayer
    weights: dict[str, dict[str, jax.Array]]


def build(
    params: Params,
    cfg: LlamaConfig,
    scores: PerLayer,
    batches: Sequence[Any],
    constraints: Constraints,
    *,
    levels: int = 16,
    damp: float = 1e-2,
    progress: Progress | None = None,
) -> Database:
    r"""Fits the output projection of every sublayer at every width, each on its own, to what the dense one adds.

    At each width the highest-scored units stay and the projection is re-fitted by masked least squares on the inputs of the
    dense model. Memory: `levels` times the output projections of the model.

    Args:
      params, cfg: the model.
      scores: per layer, axis letter -> float32[units]: in what order units go.
      batches: int32[b, t] arrays of calibration tokens.
      constraints: which layers and units may go, how few may stay, and the multiple that widths are of.
      levels: an MLP loses about `1 / levels` of its channels from one width to the next; KV groups go one by one.
      damp: see `recovery.nested_least_squares`.
      progress: wraps the sequence of sublayers; called with it and a description.

    Reference: the database of layer-wise compressed weights is of Frantar and Alistarh, `Optimal Brain Compression
    <https://arxiv.org/abs/2208.11580>`_, 2022, section 5 (mixed compression); the fit is `jaxprune.recovery.reconstruct` with
    target `dense`.

    >>> import jax
    >>> from jaxprune import allocate, models
    >>> from jaxprune.search import database
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> params, tokens = models.init(jax.random.key(0), cfg), jax.numpy.arange(12).reshape(2, 6)
    >>> scores = ({"k": jax.numpy.arange(2.0), "f": jax.numpy.arange(48.0)},)
    >>> db = database.build(params, cfg, scores, [tokens], allocate.Constraints(multiple_of=8), levels=3)
    >>> db.counts[0]["f"].tolist(), db.weights["run_0"]["down"].shape
    ([48, 32, 16], (1, 3, 48, 32))
    """
    sums = _grams(params, cfg, batches)
    full, chosen = full_widths(cfg), constraints.chosen(cfg)
    counts = [{a: _counts(a, n, i, constraints, levels, i in chosen) for a, n in layer.items()} for i, layer in enumerate(full)]
    plans: list[dict[str, list[np.ndarray]]] = [{} for _ in full]
    weights: dict[str, dict[str, list]] = {}
    items = [(run, j, a) for run in cfg.runs for j in range(run.length) for a in full[run.start]]
    for run, j, a in items if progress is None else progress(items, "fitting every width"):
        i = run.start + j
        w = on_host(params[run.name][OUTPUT[a]], j).astype(np.float32)
        flat = w.reshape(-1, w.shape[-1])
        group, stack = len(flat) // len(w), []
        order = np.argsort(-np.asarray(scores[i][a]), kind="stable")
        plans[i][a] = [np.sort(order[:n]) for n in counts[i][a]]
        inputs = (order[:, None] * group + np.arange(group)).reshape(-1)
        for fit in nested_least_squares(flat.T, sums[i][a], inputs, (group * counts[i][a]).tolist(), damp):
            fitted = np.zeros_like(flat)
            fitted[inputs[: fit.shape[1]]] = fit.T
            stack.append(fitted.reshape(w.shape))
        weights.setdefault(run.name, {}).setdefault(OUTPUT[a], []).append(np.stack(stack))
    dtype = params["embed"].dtype
    arrays = {
        name: {n: _beside_of(params[name][n], _padded(rows).astype(dtype)) for n, rows in by.items()}
        for name, by in weights.items()
    }
    return Database(tuple(counts), tuple(plans), arrays)


def _beside_of(dense: jax.Array, levels: np.ndarray) -> jax.Array:
    """[l, levels, ...] spread as the dense [l, ...] is, where that lies on a mesh."""
    if home(dense) is None or not isinstance(where := dense.sharding, NamedSharding):
        return jnp.asarray(levels)
    return on_mesh(levels, NamedSharding(where.mesh, PartitionSpec(*where.spec[:1], None, *where.spec[1:])))


def _counts(axis: str, n: int, layer: int, constraints: Constraints, levels: int, may_go: bool) -> np.ndarray:
    if not may_go or axis not in constraints.units:
        return np.array([n])
    least = constraints.fewest(axis, n, layer)
    multiple = constraints.step(axis)
    step = multiple if axis == "k" else max(1, round(n / levels / multiple)) * multiple
    below = np.arange(n // multiple * multiple if n % multiple else n - step, least - 1, -step)
    return np.array([n, *below[below < n]])


def _padded(rows: list[np.ndarray]) -> np.ndarray:
    """Layers that may not change have one level: it is there as often as others have levels."""
    most = max(map(len, rows))
    return np.stack([np.concatenate([row, np.repeat(row[-1:], most - len(row), 0)]) for row in rows])


def _moments(sites: Any) -> dict[str, jax.Array]:
    return grams(sites)


def _grams(params: Params, cfg: LlamaConfig, batches: Sequence[Any]) -> list[dict[str, np.ndarray]]:
    step = jax.jit(lambda params, tokens: observe(params, tokens, _moments, cfg))
    sums: Any = None
    for tokens in batches:
        seen = step(params, tokens)
        sums = seen if sums is None else jax.tree.map(jnp.add, sums, seen)
    return [{a: on_host(g) for a, g in layer.items()} for layer in sums]


def chosen(params: Params, db: Database, cfg: LlamaConfig, levels: dict[str, jax.Array]) -> Params:
    """The model of a candidate in the dense shapes; `levels` is axis letter -> int32[layers]."""
    out = dict(params)
    for run in cfg.runs:
        rows = jnp.arange(run.length)
        taken = {
            name: db.weights[run.name][name][rows, levels[a][run.start : run.start + run.length]]
            for a, name in OUTPUT.items()
            if name in db.weights.get(run.name, {})
        }
        if taken:
            out[run.name] = params[run.name] | taken
    return out


def as_arrays(levels: Levels) -> dict[str, np.ndarray]:
    """Per layer, axis letter -> int becomes axis letter -> int32[layers], 0 where there is no such sublayer."""
    return {a: np.array([layer.get(a, 0) for layer in levels], np.int32) for a in "kf"}


def widths(db: Database, levels: Levels) -> Widths:
    """Units that a candidate keeps."""
    return tuple({a: int(db.counts[i][a][j]) for a, j in layer.items()} for i, layer in enumerate(levels))


def plan(db: Database, levels: Levels) -> Plan:
    """What a candidate keeps."""
    keep = tuple({a: db.plans[i][a][j] for a, j in layer.items()} for i, layer in enumerate(levels))
    return Plan(keep, tuple({a: int(c[0]) for a, c in layer.items()} for layer in db.counts))


def losses_of(
    params: Params,
    cfg: LlamaConfig,
    db: Database,
    *,
    at_once: int = 1,
    microbatch: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Losses:
    """A function of candidates and int32[b, t] tokens: the mean loss of each in nats a token, from one compiled program.

    Args:
      params, cfg: the dense model.
      db: what candidates choose from.
      at_once, microbatch, devices: as in `fitness.gate_fitness`.
    """
    loss = loss_fn(cfg, remat=False, microbatch=microbatch)

    def one(constants, levels):
        params, weights, tokens = constants
        return loss(chosen(params, db._replace(weights=weights), cfg, levels), {}, tokens).mean()

    measure = over_devices(one, at_once, devices, params)
    return lambda candidates, tokens: measure((params, db.weights, spread(params, tokens)), list(map(as_arrays, candidates)))
