"""What every search stands on: losses of candidates, sizes, mutations, the loop that can be interrupted."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import allocate, models, plan, recovery, scorers, surgery
from jaxprune.models import axes
from jaxprune.search import _loop, database, evolution, importance, points, refine, sizes
from jaxprune.search.fitness import gate_fitness

CFG = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 2 + (models.LayerDims(3, 2, 40),))
PARAMS = jax.tree.map(lambda x: 3 * x, models.init(jax.random.key(0), CFG))
TOKENS = jax.random.randint(jax.random.key(1), (4, 16), 0, 64)
COUNTS = models.unit_counts(CFG)
SCORES = tuple(
    {a: np.random.default_rng([i, n]).random(n).astype(np.float32) for a, n in layer.items()} for i, layer in enumerate(COUNTS)
)
FREE = allocate.Constraints(multiple_of=4)


def half(seed=0):
    rng = np.random.default_rng(seed)
    return plan.Plan(tuple({a: rng.permutation(n)[: n // 2 + 1] for a, n in layer.items()} for layer in COUNTS), COUNTS)


def mean_loss(params, cfg, tokens=TOKENS):
    return float(models.loss_fn(cfg)(params, {}, tokens).mean())


# Losses of candidates


@pytest.mark.parametrize(("devices", "at_once"), [(1, 1), (1, 2), (8, 1), (8, 2)])
def test_a_candidate_loses_what_its_cut_model_loses(devices, at_once):
    """On any number of devices, together or alone, dense model included."""
    plans = [plan.Plan(tuple({a: range(n) for a, n in layer.items()} for layer in COUNTS), COUNTS), *map(half, range(4))]
    loss_of = gate_fitness(PARAMS, CFG, TOKENS, at_once=at_once, devices=jax.devices()[:devices])
    cut = [mean_loss(*surgery.cut(PARAMS, CFG, p)) for p in plans]
    np.testing.assert_allclose(loss_of(plans), cut, rtol=1e-5)
    assert loss_of([]).shape == (0,)


def test_a_loss_that_is_no_number_is_the_worst():
    broken = PARAMS | {"norm": PARAMS["norm"] * jnp.nan}
    assert gate_fitness(broken, CFG, TOKENS)([half()]).tolist() == [np.inf]
    with pytest.raises(ValueError, match="at_once: 0 given"):
        gate_fitness(PARAMS, CFG, TOKENS, at_once=0)


@pytest.fixture(scope="module")
def db():
    return database.build(PARAMS, CFG, SCORES, [TOKENS[:2], TOKENS[2:]], FREE, levels=4, damp=1e-5)


def test_a_candidate_of_the_database_is_the_model_fitted_sublayer_by_sublayer(db):
    """Its loss is that of `reconstruct` with the dense model's statistics, on the same units."""
    levels = ({"k": 1, "f": 2}, {"k": 0, "f": 0}, {"k": 2, "f": 1})
    keep = database.plan(db, levels)
    assert [{a: len(x) for a, x in layer.items()} for layer in keep.keep] == list(database.widths(db, levels))
    fitted, cfg = recovery.reconstruct(PARAMS, CFG, keep.keep, [TOKENS], target="dense", damp=1e-5)
    loss = database.losses_of(PARAMS, CFG, db)([levels, ({"k": 0, "f": 0},) * 3], TOKENS)
    gated = float(models.loss_fn(cfg)(fitted, surgery.gates_of(keep, cfg), TOKENS).mean())
    np.testing.assert_allclose(loss, [gated, mean_loss(PARAMS, CFG)], rtol=1e-5)


def test_the_database_offers_what_constraints_allow():
    limits = allocate.Constraints(layers=(1, 3), units="f", multiple_of=8, min_kept=0.5, channels=(48, 48, 40))
    counts = database.build(PARAMS, CFG, SCORES, [TOKENS], limits, levels=6).counts
    assert [{a: c.tolist() for a, c in layer.items()} for layer in counts] == [
        {"k": [2], "f": [48]},
        {"k": [2], "f": [48, 40, 32, 24]},
        {"k": [3], "f": [40, 32, 24]},
    ]


@pytest.mark.parametrize("rank", [3, 40])
def test_nested_sets_have_the_weights_of_each_alone(rank):
    rng = np.random.default_rng(0)
    x, w, order = rng.normal(size=(12, rank)), rng.normal(size=(5, 12)), rng.permutation(12)
    nested = recovery.nested_least_squares(w, x @ x.T, order, [12, 7, 1, 0])
    for n, found in zip((12, 7, 1, 0), nested, strict=True):
        alone = recovery.masked_least_squares(w, x @ x.T, order[:n]) if n < 12 else w[:, order]
        np.testing.assert_allclose(found, alone, atol=1e-8)


def test_importance_is_the_sum_of_the_errors_of_single_weights():
    """Against its definition: each weight alone is removed and the others of its row are re-fitted."""
    scorer = importance.obs_importance(CFG, PARAMS, damp=1e-2)
    found = scorers.score(scorer, PARAMS, models.probes(CFG), [TOKENS[:2], TOKENS[2:]])
    sites: Any = models.observe(PARAMS, TOKENS, lambda s: {a: (x.read, x.z) for a, x in s.items()}, CFG)
    arrays = {n: np.asarray(x[0], np.float64) for n, x in PARAMS[CFG.runs[1].name].items()}
    read, z = (np.asarray(x, np.float64).reshape(TOKENS.size, -1) for x in sites[2]["f"])
    total = np.zeros(40)
    for unit in range(40):
        rows = [(arrays["gate"][:, unit], read, None), (arrays["up"][:, unit], read, None)]
        rows += [(arrays["down"][:, j], z, unit) for j in range(CFG.d)]
        for w, x, only in rows:
            gram = x.T @ x
            inverse = np.linalg.inv(2 * (gram + 1e-2 * np.trace(gram) / len(gram) * np.eye(len(gram))))
            columns = range(len(w)) if only is None else [only]
            total[unit] += sum(w[c] ** 2 / inverse[c, c] for c in columns)
    np.testing.assert_allclose(found[2]["f"], total, rtol=2e-4)
    assert all(axes.OUTPUT.keys() == layer.keys() for layer in found)


# Sizes


@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.5])
@pytest.mark.parametrize("scores", [None, SCORES], ids=["random", "by score"])
def test_any_candidate_is_brought_to_an_allowed_size(ratio, scores):
    window = sizes.of_ratio(CFG, ratio, FREE.multiple_of)
    for seed in range(5):
        found = sizes.fit(half(seed), CFG, window, FREE, np.random.default_rng(seed), scores)
        assert found is not None and window.holds(sizes.cost_of(found, CFG, window))
        assert all(len(layer["f"]) >= FREE.fewest("f", 48, i) for i, layer in enumerate(found.keep))
        assert all((a["k"] == b["k"]).all() for a, b in zip(found.keep, half(seed).keep, strict=True))
    exact = sizes.fit(found, CFG, sizes.tight(CFG, window, 4), FREE, np.random.default_rng(0), scores)
    assert 0 <= window.high - sizes.cost_of(exact, CFG, window) < 4 * 96


def test_sizes_that_cannot_be_reached():
    window = sizes.of_ratio(CFG, 0.9, 4)
    assert sizes.fit(half(), CFG, window, allocate.Constraints(min_kept=0.9), np.random.default_rng(0)) is None
    assert sizes.fit(half(), CFG, window, allocate.Constraints(units="k"), np.random.default_rng(0)) is None
    with pytest.raises(ValueError, match=r"ratio: 1.5 given"):
        sizes.of_ratio(CFG, 1.5)


# Evolution


@pytest.mark.parametrize("width", [5, 50, 90])
@pytest.mark.parametrize("kept", [10, 50, 100])
def test_mutated_masks_have_their_width_and_overlap(kept, width):
    rng = np.random.default_rng(0)
    old = rng.permutation(100)[:kept]
    new = evolution.mask_mutation(old, 100, width, rng, evolution.Evolution())
    assert len(np.unique(new)) == width
    assert len(np.intersect1d(old, new)) >= min(width, int(np.ceil(0.8 * kept)))
    literal = evolution.mask_mutation(old, 100, width, rng, evolution.Evolution(literal=True, tries=20))
    assert set(literal) == set(old) or len(np.intersect1d(old, literal)) >= 80


def evolved(schedule=None, ratio=0.3, window=None, fitness=None, limits=None, **options):
    schedule = schedule or evolution.Evolution(population=6, generations=3, keep=2, mutations=3, crossovers=2, fresh=1)
    window = window or sizes.of_ratio(CFG, ratio, FREE.multiple_of)
    measured: list[plan.Plan] = []

    def ones(plans):
        measured.extend(plans)
        return np.array([float(sum(layer["f"].sum() for layer in p.keep)) for p in plans])

    start = plan.select(SCORES, allocate.local(SCORES, CFG, round(ratio * CFG.decoder_parameters), FREE))
    problem = evolution.problem(CFG, start, fitness or ones, window, FREE, schedule, limits or evolution.space(0.6))
    options = dict(generations=schedule.generations, keep=schedule.keep, seed=0, settings={}) | options
    return _loop.evolve(problem, **options), measured, window


def test_only_allowed_sizes_are_measured_and_none_twice():
    found, measured, window = evolved()
    assert len(measured) == len({p.digest for p in measured}) == len(found.points) > 10
    assert all(window.holds(sizes.cost_of(p, CFG, window)) for p in measured)
    assert [x for x, _ in found.best] == sorted(x for x, _ in found.best)
    assert found.best[0][0] == min(p.loss for p in found.points)
    front = points.front(found.points)
    assert all(p.plan is not None for p in front) and any(p.plan is None for p in found.points)


def test_layers_go_and_come_back():
    settings = evolution.Evolution(population=4, generations=6, keep=2, mutations=6, crossovers=2, fresh=0, depth_rate=1.0)
    _, measured, _ = evolved(settings, ratio=0.5, limits=evolution.Space(0.3, 0.1, 0.5))
    assert {sum(not len(layer["f"]) and not len(layer["k"]) for layer in p.keep) for p in measured} == {0, 1}


def test_equal_widths_stay_equal():
    settings = evolution.Evolution(
        population=4,
        generations=2,
        keep=2,
        mutations=3,
        crossovers=2,
        fresh=1,
        ratio_rate=0.0,
        first_ratio_rate=0.0,
        depth_rate=0.0,
    )
    start = plan.select(SCORES, allocate.local(SCORES, CFG, round(0.3 * CFG.decoder_parameters), FREE))
    window = sizes.of_ratio(CFG, 0.3)
    size = sizes.cost_of(start, CFG, window)
    _, measured, _ = evolved(settings, window=window._replace(low=size, high=size))
    assert len({tuple(tuple(map(len, layer.values())) for layer in p.keep) for p in measured}) == 1 < len(measured)


def test_rotary_pairs_are_masked_as_they_are_cut():
    """The paper's own unit of the attention: what is measured is what the cut model loses, at sizes that are allowed."""
    counts = models.unit_counts(CFG, "hf")
    scorer = importance.obs_importance(CFG, PARAMS, pairs=True)
    scores = scorers.score(scorer, PARAMS, models.probes(CFG), [TOKENS])
    assert [{a: len(s) for a, s in layer.items()} for layer in scores] == list(counts)
    groups = scorers.score(importance.obs_importance(CFG, PARAMS), PARAMS, models.probes(CFG), [TOKENS])
    for by_pair, by_group in zip(scores, groups, strict=True):  # the same weights, summed in another order
        np.testing.assert_allclose(by_pair["h"].sum(), by_group["k"].sum(), rtol=1e-5)
    start = plan.select(scores, tuple({"h": 3, "f": n["f"] - 8} for n in counts))
    free, window = allocate.Constraints(units="hf", multiple_of=4), sizes.of_ratio(CFG, 0.3, 4)
    measured: list[plan.Plan] = []
    loss_of = gate_fitness(PARAMS, CFG, TOKENS)

    def losses(plans):
        measured.extend(plans)
        return loss_of(plans)

    settings = evolution.Evolution(population=6, generations=2, keep=2, mutations=5, crossovers=3, fresh=2, depth_rate=0.5)
    problem = evolution.problem(CFG, start, losses, window, free, settings, evolution.Space(0.2, 0.1, 0.5))
    found = _loop.evolve(problem, generations=2, keep=2, seed=0, settings={})
    assert all(window.holds(sizes.cost_of(p, CFG, window)) for p in measured)
    assert len({len(layer["h"]) for p in measured for layer in p.keep}) > 2, "pairs come and go"
    for loss, best in found.best:
        np.testing.assert_allclose(mean_loss(*surgery.cut(PARAMS, CFG, best)), loss, atol=2e-5)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_interrupted_search_finds_the_same(tmp_path, at):
    whole, *_ = evolved(checkpoint=tmp_path / "whole.json")

    class Stop(Exception):
        pass

    def stop(generation, found):
        if generation == at:
            raise Stop

    with pytest.raises(Stop):
        evolved(checkpoint=tmp_path / "state.json", on_generation=stop)
    again, measured, _ = evolved(checkpoint=tmp_path / "state.json")
    assert [(x, p.digest) for x, p in again.best] == [(x, p.digest) for x, p in whole.best]
    assert [p._replace(plan=None) for p in again.points] == [p._replace(plan=None) for p in whole.points]
    assert len(measured) < len(whole.points)
    with pytest.raises(ValueError, match=r"of a search with other settings \(ratio\)"):
        evolved(checkpoint=tmp_path / "state.json", settings={"ratio": 0.4})


def test_devices_change_no_decision():
    """The same search on 1 and on 8: candidates are spread over them, never tokens."""
    schedule = evolution.Evolution(population=10, generations=2, keep=2, mutations=6, crossovers=2, fresh=0)
    one, eight = (evolved(schedule, fitness=gate_fitness(PARAMS, CFG, TOKENS, devices=jax.devices()[:n]))[0] for n in (1, 8))
    assert [(x, p.digest) for x, p in one.best] == [(x, p.digest) for x, p in eight.best]
    assert [p.loss for p in one.points] == [p.loss for p in eight.points]


@pytest.mark.parametrize(
    "given",
    [dict(population=0), dict(generations=-1), dict(keep=0), dict(mutations=-1), dict(ratio_rate=-0.5), dict(overlap=1.5)],
)
def test_schedules_that_make_no_sense(given):
    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=f"{name}: {value} given"):
        evolution.Evolution(**given)


# Exchanges of width


def test_exchanges_keep_the_size_and_beat_where_they_start(db):
    window = sizes.of_ratio(CFG, 0.3, 4)
    curves = tuple({a: np.sort(x).cumsum()[np.argsort(np.argsort(x))] for a, x in layer.items()} for layer in SCORES)
    recipe = allocate.local(SCORES, CFG, round(0.3 * CFG.decoder_parameters), FREE)
    schedule = refine.Refinement(generations=3, offspring=4)
    losses = database.losses_of(PARAMS, CFG, db)
    problem = refine.problem(CFG, db, lambda some: losses(some, TOKENS), curves, window, FREE, schedule, recipe)
    found = _loop.evolve(problem, generations=3, keep=2, seed=0, settings={})
    allowed = refine.widened(db, CFG, window)
    assert all(allowed.holds(p.cost) for p in found.points)
    start = refine.start(CFG, db, window, recipe)
    assert found.best[0][0] <= float(losses([start], TOKENS)[0])
    for name in ("generations", "offspring", "keep", "exchanges"):
        with pytest.raises(ValueError, match=f"{name}: -1"):
            refine.Refinement(**{name: -1})


# Points


@pytest.mark.parametrize("seed", range(5))
def test_nothing_beats_the_front(seed):
    rng = np.random.default_rng(seed)
    some = [points.Point(float(x), float(y), None, "a") for x, y in rng.integers(0, 8, (20, 2))]
    front = points.front(some)
    for p in some:
        beaten = any(q.cost <= p.cost and q.loss <= p.loss and (q.cost, q.loss) != (p.cost, p.loss) for q in some)
        assert beaten != any((q.cost, q.loss) == (p.cost, p.loss) for q in front)
