"""Budgets that users set: costs are those of real arrays, targets are met from below, times are read from a table."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxprune import _block_latency, _narrow, budgets, models, pipeline, surgery
from jaxprune.models import LayerDims, LlamaConfig, axes, decode

CFG = LlamaConfig(vocab=32, d=32, head_dim=8, layers=(LayerDims(4, 2, 320),) * 4, tie_embeddings=True)
TOKENS = np.arange(48, dtype=np.int32).reshape(2, 24) % 32
GOALS = dict(parameters=budgets.parameters(1), memory=budgets.memory(1, context=64), flops=budgets.flops(1, context=64))
WHEN = _block_latency.Conditions("decode", 1, 16, "float32")


@pytest.fixture(scope="module")
def params():
    return models.init(jax.random.key(0), CFG)


def prune(params, goal, cfg=CFG, method="magnitude", **given):
    settings = pipeline.Settings(method=method, **dict(reconstruct="none", multiple_of=4) | given)
    return pipeline.prune(params, cfg, TOKENS, settings, goal=goal)


def size(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("tied", [True, False])
def test_costs_are_those_of_the_arrays(tied):
    cfg = dataclasses.replace(CFG, tie_embeddings=tied, layers=(LayerDims(3, 2, 40), LayerDims(0, 0, 48), LayerDims(1, 2, 0)))
    params = models.init(jax.random.key(0), cfg, "bfloat16")
    assert budgets.parameters(1).cost(cfg) == size(params)
    cache = decode.init_cache(cfg, 2, 10, "bfloat16")
    assert budgets.memory(1, "bfloat16", 2, 10).cost(cfg) == sum(x.nbytes for x in jax.tree.leaves((params, cache)))
    used = {"head": params["embed" if tied else "head"], "runs": {r.name: params[r.name] for r in cfg.runs}}
    weights = sum(x.size for path, x in jax.tree_util.tree_leaves_with_path(used) if not path[-1].key.endswith("norm"))
    scores = sum(2 * 2 * x.shape[0] * 10 * cfg.head_dim * x.shape[-2] * 2 for x in (run["k"] for run in cache.values()))
    assert budgets.flops(1, context=10).cost(cfg) == 2 * weights + scores  # two query heads to a key head
    window = dataclasses.replace(cfg, sliding_window=5)
    assert budgets.flops(1, context=10).cost(window) == 2 * weights + scores / 2


def test_shortcuts_are_matrices_too():
    cfg = dataclasses.replace(CFG, shortcuts=True)
    more = size([x for n, x in models.shapes(cfg)["run_0"].items() if n in axes.SHORTCUTS])
    assert budgets.flops(1).cost(cfg) - budgets.flops(1).cost(CFG) == 2 * more


@pytest.mark.parametrize(
    ("ranking", "goal", "left"),
    [
        ("local", "parameters", 0.9), ("local", "memory", 0.6), ("local", "flops", 0.4), ("global", "parameters", 0.4),
        ("global", "memory", 0.9), ("linear", "flops", 0.7), ("lagrangian", "memory", 0.4), ("gamma", "parameters", 0.7),
    ],
)  # fmt: skip
def test_a_target_is_met_from_below(params, goal, ranking, left):
    target = GOALS[goal]._replace(limit=left * GOALS[goal].cost(CFG))
    out = prune(params, target, ranking=ranking, method="random")
    reached = target.cost(out.cfg)
    assert out.met.cost == out.met.reached == reached
    assert 0.99 * target.limit <= reached <= target.limit
    assert size(out.params) == models.count_parameters(out.cfg)
    assert surgery.pruned_config(CFG, out.plan) == out.cfg


@pytest.mark.parametrize(
    ("given", "coarse"),
    [
        (dict(method="wanda-sp"), 0.01),
        (dict(method="flap", reconstruct="bias"), 0.01),
        (dict(method="taylor", units=("mlp",), layers=(1, 4)), 0.01),
        (dict(method="magnitude", max_distinct=2), 0.02),
        (dict(method="magnitude", units=("hidden",), multiple_of=1), 0.04),
        (dict(method="slicegpt", units=("rotated",)), 0.3),
    ],
)
def test_every_kind_of_method_meets_a_target(params, given, coarse):
    target = budgets.parameters(0.7 * models.count_parameters(CFG))
    out = prune(params, target, **given)
    assert size(out.params) == target.cost(out.cfg) <= target.limit
    assert size(out.params) >= (1 - coarse) * target.limit
    assert any("too coarse" in note for note in out.notes) == (size(out.params) < 0.99 * target.limit)


def test_the_ratio_that_was_found_gives_the_same_plan(params):
    out = prune(params, budgets.parameters(0.6 * models.count_parameters(CFG)), ranking="global")
    again = prune(params, None, ranking="global", ratio=out.met.ratio)
    assert again.plan.to_json() == out.plan.to_json() and again.met is None


def test_scores_and_curves_are_computed_once(params, monkeypatch):
    from jaxprune import scorers, sensitivity

    calls = []
    for module, name in ((scorers, "score"), (sensitivity, "curves")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name, **k: (calls.append(name), real(*a, **k))[1])
    prune(params, budgets.memory(0.6 * budgets.memory(1).cost(CFG)), method="taylor", ranking="sensitivity")
    assert calls == ["score", "curves"]


@pytest.mark.parametrize("units", ["layers", "sublayers", "kv"])
def test_coarse_units_take_the_nearest_below_and_say_so(params, units):
    limit, dims = 0.945 * models.count_parameters(CFG), CFG.layers[0]
    out = prune(params, budgets.parameters(limit), units=(units,), method="sublayers" if units == "sublayers" else "magnitude")
    mlp = 3 * CFG.d * dims.ff + CFG.d
    unit = dict(layers=CFG.matrix_parameters(dims) + 2 * CFG.d, sublayers=mlp, kv=models.unit_costs(CFG)[0]["k"])[units]
    assert limit - unit < size(out.params) <= limit
    assert bool(out.met.more) == (units == "kv") and len(out.notes) == 1
    assert ("units back" if units == "kv" else "too coarse") in out.notes[0]


@pytest.mark.parametrize("units", [("kv", "mlp"), ("kv",)])
def test_layers_get_units_back_where_steps_are_too_coarse(params, units):
    goal = budgets.memory(1, context=500)
    at = _narrow.at_ratio((), CFG, pipeline.Settings(method="magnitude", units=units))
    costs = [goal.cost(at(float(ratio))) for ratio in np.linspace(0.001, 0.12 if units == ("kv",) else 0.5, 400)]
    i = int(np.argmin(np.diff(costs)))  # where all layers lose a group at once
    target = goal._replace(limit=0.3 * costs[i + 1] + 0.7 * costs[i])
    out = prune(params, target, ranking="local", units=units)
    assert costs[i + 1] < target.cost(out.cfg) == out.met.cost <= target.limit
    assert out.met.more and any(f"layers got {out.met.more} units back" in note for note in out.notes)
    assert target.cost(out.cfg) >= 0.99 * target.limit or units == ("kv",)
    assert surgery.pruned_config(CFG, out.plan) == out.cfg


def test_what_cannot_be_met_says_what_can(params):
    with pytest.raises(
        ValueError, match=r"200.00k parameters given; the model has 148.77k.* so it is met already; ask for less"
    ):
        prune(params, budgets.parameters(200e3))
    with pytest.raises(ValueError, match=r"5.00k parameters given; with these layers, units and multiples at least (\S+)k"):
        prune(params, budgets.parameters(5e3))
    smallest = _narrow.smallest(CFG, pipeline.Settings(method="magnitude", multiple_of=4))
    least = models.count_parameters(smallest)
    assert size(prune(params, budgets.parameters(least)).params) == least
    with pytest.raises(ValueError, match="parameters stay"):
        prune(params, budgets.parameters(1e3), units=("layers",))
    with pytest.raises(ValueError, match="steps: 2 given; a target is met in one step"):
        prune(params, budgets.parameters(1e5), steps=2)


def test_gates_are_those_of_the_plan(params):
    target = budgets.parameters(0.6 * models.count_parameters(CFG))
    settings = pipeline.Settings(method="flap", multiple_of=4)
    made = pipeline.gates(params, CFG, TOKENS, settings, goal=target)
    plan = pipeline.prune(params, CFG, TOKENS, settings, goal=target).plan
    assert jax.tree.all(jax.tree.map(np.array_equal, made, surgery.gates_of(plan, CFG)))


@pytest.mark.parametrize(
    ("text", "what", "value"),
    [
        ("100M", "parameters", 1e8), ("1.5B", "parameters", 1.5e9), ("7e3", "parameters", 7e3), ("2k", "flops", 2e3),
        ("200MB", "memory", 2e8), ("2 GiB", "memory", 2**31), ("64", "memory", 64), (".5s", "latency", 0.5),
        ("20ms", "latency", 0.02), ("5us", "latency", 5e-6), ("50", "throughput", 50), ("1.2k", "throughput", 1200),
    ],
)  # fmt: skip
def test_amounts(text, what, value):
    assert budgets.amount(text, what) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "memory"), ("M", "parameters"), ("-1M", "parameters"), ("0", "parameters"), ("1e999", "memory"), ("nan", "memory"),
        ("20", "latency"), ("20m", "latency"), ("1MB", "parameters"), ("1 0M", "parameters"), ("200mb", "memory"),
        ("\u0663M", "parameters"), ("1,5B", "parameters"),
    ],
)  # fmt: skip
def test_amounts_that_are_none(text, what):
    with pytest.raises(ValueError, match="given; give a positive number with one of the suffixes"):
        budgets.amount(text, what)


class Clock:
    """In place of a stopwatch: a second for each 1e9 weights, a constant beside them, `slow` times that for mixed models."""

    def __init__(self, slow=1.0):
        self.calls, self.slow = 0, slow

    def __call__(self, cfg, when, of=None):
        self.calls += 1
        mixed = all(d.kv_heads and d.ff for d in cfg.layers) and cfg.layers != CFG.layers
        return (1e-4 + 1e-9 * cfg.decoder_parameters) * (self.slow if mixed else 1)


@pytest.fixture
def clock(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    clock = Clock()
    monkeypatch.setattr(_block_latency, "seconds", clock)
    return clock


def test_the_prediction_is_the_table(clock):
    table = _block_latency.measure(CFG, WHEN)
    assert _block_latency.predicted(table, CFG, CFG) == table.dense
    for kind, found in table.blocks.items():
        for width, each in found:
            assert table.block(kind, int(width)) == each
            dims = LayerDims(4, 2, int(width)) if "mlp" in kind else LayerDims(int(width), 2 if width else 0, 320)
            cfg = dataclasses.replace(CFG, layers=(*CFG.layers[:2], dims, dims))
            assert _block_latency.predicted(table, CFG, cfg) == pytest.approx(clock(cfg, WHEN), rel=0.02)
    widths = range(0, 321, 8)
    times = [table.block("mlp", w) for w in widths]
    assert times == sorted(times)


def test_narrower_streams_are_measured_whole(clock):
    at = _narrow.narrower(CFG, pipeline.Settings(method="slicegpt", units=("rotated",)))
    table = _block_latency.measure_widths(CFG, at, WHEN, None)
    for width in (8, 16, 24, 32):
        assert _block_latency.predicted(table, CFG, at(width)) == pytest.approx(clock(at(width), WHEN))
    assert _block_latency.predicted(table, CFG, CFG) == clock(CFG, WHEN)


def test_the_table_is_measured_once(clock, tmp_path):
    said = []
    first = _block_latency.cached(CFG, WHEN, say=said.append)
    calls, (path,) = clock.calls, (tmp_path / "cache" / "jaxprune").iterdir()
    assert calls == 2 * 4 + 8 + 4 + 3  # KV groups and MLP widths, in stacks and alone, and three models
    assert f"{path}; delete it" in said[-1]
    assert _block_latency.cached(CFG, WHEN) == first and clock.calls == calls
    _block_latency.cached(CFG, WHEN._replace(context=17))
    assert clock.calls == 2 * calls and len(list(path.parent.iterdir())) == 2


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", "nan", "negative", "short"])
def test_a_damaged_table_is_measured_again(clock, damage):
    said = []
    first = _block_latency.cached(CFG, WHEN)
    path, key = _block_latency.place(CFG, WHEN, "blocks")
    content = json.loads(path.read_text())
    changed = {"nan": dict(dense=float("nan")), "negative": dict(outside=-1), "short": dict(blocks={"mlp": [[1]]})}
    path.write_text(json.dumps(content | changed[damage]) if damage in changed else damage)
    calls = clock.calls
    assert _block_latency.cached(CFG, WHEN, say=said.append) == first and clock.calls == 2 * calls
    assert "not a table of latencies" in said[0] and _block_latency.load(path, key) == first


def test_a_table_that_cannot_be_kept_serves_all_the_same(clock, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    said = []
    assert _block_latency.cached(CFG, WHEN, say=said.append).dense == clock(CFG, WHEN)
    assert "not kept" in said[-1]


@pytest.mark.parametrize("slow", [1.0, 1.2, 0.85])
def test_times_are_measured_and_chosen_again(params, clock, slow):
    table = _block_latency.measure(CFG, WHEN)
    stopwatch, said = Clock(slow), []
    limit = 0.8 * table.dense
    goal = budgets.latency(
        limit, lambda cfg: _block_latency.predicted(table, CFG, cfg), lambda cfg: stopwatch(cfg, WHEN), given=WHEN._asdict()
    )
    settings = pipeline.Settings(method="magnitude", reconstruct="none", multiple_of=4)
    out = pipeline.prune(params, CFG, TOKENS, settings, said.append, goal=goal)
    assert out.met.measured == Clock(slow)(out.cfg, WHEN)
    assert 0.9 * limit <= out.met.measured <= limit and not out.notes
    assert stopwatch.calls == (1 if slow == 1 else 2) and sum("measured" in line for line in said) == stopwatch.calls


def test_a_time_that_is_out_of_reach_is_said(params, clock):
    table = _block_latency.measure(CFG, WHEN)
    goal = budgets.latency(0.9 * table.dense, lambda cfg: _block_latency.predicted(table, CFG, cfg), lambda cfg: table.dense)
    out = prune(params, goal)
    assert out.met.reached == table.dense and "11.1% over, the nearest that was found" in out.notes[-1]
    with pytest.raises(ValueError, match="ms stay"):
        prune(params, goal._replace(limit=table.dense / 100))


def test_seconds_run_the_model(monkeypatch):
    monkeypatch.setattr(_block_latency, "ENOUGH", 0.0)
    for phase in ("prefill", "decode"):
        assert _block_latency.seconds(CFG, WHEN._replace(phase=phase)) > 0
    assert WHEN.tokens == 1 and WHEN._replace(phase="prefill", batch=2).tokens == 32
