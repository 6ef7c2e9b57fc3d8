"""Budgets: golden counts of LLM-Pruner, exactness, multiples, floors, shapes."""

import dataclasses

import numpy as np
import pytest

from jaxprune import _shapes, allocate, models
from jaxprune.allocate import Constraints
from jaxprune.models import LayerDims, LlamaConfig


def llama(layers, d, heads, kv, head_dim, ff, vocab, **more):
    return LlamaConfig(vocab=vocab, d=d, head_dim=head_dim, layers=(LayerDims(kv, heads // kv, ff),) * layers, **more)


LLAMA_7B = llama(32, 4096, 32, 32, 128, 11008, 32000)
LLAMA_3_8B = llama(32, 4096, 32, 8, 128, 14336, 128256)
TINYLLAMA = llama(22, 2048, 32, 4, 64, 5632, 32000)
SMOLLM2 = llama(30, 576, 9, 3, 64, 1536, 49152, tie_embeddings=True)


ALLOCATORS = dict(
    local=allocate.local,
    global_=allocate.global_,
    gamma=allocate.gamma(3.36),
    linear=allocate.depth("linear"),
    log=allocate.depth("log", 1.0),
    lagrangian=allocate.lagrangian(0.85, 1.5),
)


def after(cfg, widths):
    layers = tuple(LayerDims(w["k"], dims.q_per_kv, w["f"]) for dims, w in zip(cfg.layers, widths, strict=True))
    return models.count_parameters(dataclasses.replace(cfg, layers=layers))


def scores_of(cfg, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(
        {"k": rng.exponential(size=dims.kv_heads) * 100, "f": rng.exponential(size=dims.ff) * (1 + i / 9)}
        for i, dims in enumerate(cfg.layers)
    )


@pytest.mark.parametrize(
    ("cfg", "ratio", "layers", "parameters"),
    [
        (LLAMA_7B, 0.25, (4, 30), 5_422_977_024),
        (LLAMA_3_8B, 0.25, (4, 30), 6_612_586_496),
        (TINYLLAMA, 0.25, (4, 18), 945_907_712),
        (LLAMA_7B, 0.6, (3, 31), 3_350_188_032),
        (LLAMA_7B, 0.6, (4, 30), 3_592_204_288),
    ],
)
def test_llm_pruners_own_counts(cfg, ratio, layers, parameters):
    """Published by LLM-Pruner: its paper, issue 34 of its repository, and its results for Llama 3."""
    assert after(cfg, allocate.llm_pruner(ratio)((), cfg, 0, Constraints(layers=layers))) == parameters


def test_local_ranking_on_smollm2_leaves_attention_and_takes_a_third_of_the_channels():
    widths = allocate.local((), SMOLLM2, SMOLLM2.decoder_parameters // 5, Constraints(layers=(4, 28), multiple_of=8))
    assert widths[:4] == widths[28:] + widths[:2] == ({"k": 3, "f": 1536},) * 4
    assert widths[4:28] == ({"k": 3, "f": 1024},) * 24


@pytest.mark.parametrize("ratio", [0.03, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("allocator", ALLOCATORS.values(), ids=ALLOCATORS)
@pytest.mark.parametrize("multiple_of", [1, 8])
def test_the_budget_is_met_within_half_a_point(ratio, allocator, multiple_of):
    constraints = Constraints(multiple_of=multiple_of)
    widths = allocator(scores_of(SMOLLM2), SMOLLM2, round(ratio * SMOLLM2.decoder_parameters), constraints)
    assert abs(allocate.removed(SMOLLM2, widths) / SMOLLM2.decoder_parameters - ratio) < 0.005
    assert all(w["k"] >= 1 and w["f"] >= multiple_of and w["f"] % multiple_of == 0 for w in widths)


@pytest.mark.parametrize("allocator", ALLOCATORS.values(), ids=ALLOCATORS)
def test_numbers_of_kv_groups_are_multiples_or_whole(allocator):
    for have, kept in ((8, {2, 4, 6, 8}), (3, {2, 3}), (1, {1})):
        cfg = dataclasses.replace(SMOLLM2, layers=(LayerDims(have, 2, 1536),) * 12)
        budget = round(0.5 * cfg.decoder_parameters)
        widths = allocator(scores_of(cfg), cfg, budget, Constraints(multiple_of=8, kv_multiple_of=2))
        assert {w["k"] for w in widths} <= kept and {w["f"] % 8 for w in widths} == {0}
        assert abs(allocate.removed(cfg, widths) - budget) / cfg.decoder_parameters < 0.005


def test_global_ranking_takes_the_lowest_scores_first():
    budget = round(0.3 * SMOLLM2.decoder_parameters)
    scores = scores_of(SMOLLM2)
    widths = allocate.global_(scores, SMOLLM2, budget, Constraints(units="f"))
    kept = np.concatenate([np.sort(s["f"])[len(s["f"]) - w["f"] :] for s, w in zip(scores, widths, strict=True)])
    gone = np.concatenate([np.sort(s["f"])[: len(s["f"]) - w["f"]] for s, w in zip(scores, widths, strict=True)])
    assert gone.max() <= kept.min() and {w["k"] for w in widths} == {3}


def test_layers_and_units_outside_the_constraints_are_left_alone():
    constraints = Constraints(layers=(2, 5), units="f")
    for allocator in (allocate.local, allocate.global_):
        widths = allocator(scores_of(SMOLLM2), SMOLLM2, 2_000_000, constraints)
        assert all(w == {"k": 3, "f": 1536} for i, w in enumerate(widths) if i not in (2, 3, 4))
        assert all(w["k"] == 3 for w in widths) and any(w["f"] < 1536 for w in widths)


def test_whole_layers_go_by_their_sum():
    scores = tuple({"k": np.full(3, float(i % 7)), "f": np.full(1536, float(i % 7))} for i in range(30))
    widths = allocate.whole_layers(scores, SMOLLM2, SMOLLM2.decoder_parameters // 6, Constraints())
    assert [i for i, w in enumerate(widths) if w["f"] == 0 == w["k"]] == [0, 7, 14, 21, 28]


@pytest.mark.parametrize("most", [1, 2, 5])
def test_merged_shapes_are_few_and_meet_the_budget(most):
    budget, constraints = round(0.4 * SMOLLM2.decoder_parameters), Constraints(multiple_of=8)
    widths = allocate.global_(scores_of(SMOLLM2), SMOLLM2, budget, constraints)
    merged = _shapes.merge(widths, SMOLLM2, budget, constraints, most)
    assert len({tuple(w.items()) for w in merged}) <= most < len({tuple(w.items()) for w in widths})
    assert abs(allocate.removed(SMOLLM2, merged) - budget) / SMOLLM2.decoder_parameters < 0.005


def test_more_than_there_is_cannot_be_removed():
    for allocator in (allocate.local, allocate.global_):
        with pytest.raises(ValueError, match="removing 50.0% of the decoder given; .* at most .* can go; lower --ratio"):
            allocator(scores_of(SMOLLM2), SMOLLM2, SMOLLM2.decoder_parameters // 2, Constraints(units="k"))
    with pytest.raises(ValueError, match="every layer; lower --ratio"):
        allocate.whole_layers(scores_of(SMOLLM2), SMOLLM2, SMOLLM2.decoder_parameters, Constraints())
    with pytest.raises(ValueError, match="already have 1 shapes; ask for at least 2"):
        widths = allocate.local((), SMOLLM2, 2_000_000, Constraints(layers=(3, 9)))
        _shapes.merge(widths, SMOLLM2, 2_000_000, Constraints(layers=(3, 9)), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(multiple_of=0), "multiple_of: 0 given"),
        (dict(kv_multiple_of=0), "kv_multiple_of: 0 given"),
        (dict(units="kz"), "units: 'kz' given; allowed are"),
        (dict(layers=(5, 5)), "layers: 5:5 given; this model has layers 0:30"),
        (dict(layers=(0, 31)), "layers: 0:31 given"),
    ],
)
def test_constraints_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Constraints(**options).chosen(SMOLLM2)


def test_gamma_takes_channels_that_many_times_as_readily():
    """NIRVANA's counts for Llama-3.1-8B at one half: 44 of 256 groups and 57.8 % of the channels."""
    widths = allocate.gamma(3.36)(scores_of(LLAMA_3_8B), LLAMA_3_8B, LLAMA_3_8B.decoder_parameters // 2, Constraints())
    groups, channels = (sum(w[a] for w in widths) for a in "kf")
    assert 256 - groups == 44
    assert abs((458_752 - channels) - 265_197) < 1500  # the half group that was rounded down goes to the channels


@pytest.mark.parametrize("schedule", ["linear", "log"])
def test_depth_takes_more_from_later_layers(schedule):
    cfg = SMOLLM2
    widths = allocate.depth(schedule, 0.8)((), cfg, cfg.decoder_parameters // 3, Constraints(units="f"))
    kept = [w["f"] for w in widths]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1]
    flat = allocate.depth(schedule, 0.0)((), cfg, cfg.decoder_parameters // 3, Constraints(units="f"))
    assert len({w["f"] for w in flat}) == 1


def test_lagrangian_is_the_best_of_all_allocations():
    """At the budgets of the convex hull, where a price of parameters makes one allocation the best of all."""
    cfg = LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 1, 5),) * 2)
    rng = np.random.default_rng(3)
    curves = tuple({a: np.cumsum(np.sort(rng.exponential(size=n))) for a, n in (("k", 2), ("f", 5))} for _ in cfg.layers)

    def loss(widths):
        gone = ((c[a], len(c[a]) - w[a]) for c, w in zip(curves, widths, strict=True) for a in w)
        return sum(np.sort(c)[n - 1] for c, n in gone if n)

    every = [({"k": a, "f": b}, {"k": c, "f": d}) for a in (1, 2) for b in range(1, 6) for c in (1, 2) for d in range(1, 6)]
    best = [min(every, key=lambda w: loss(w) - price * allocate.removed(cfg, w)) for price in np.geomspace(1e-5, 1e-1, 40)]
    budgets = {allocate.removed(cfg, w): w for w in best if allocate.removed(cfg, w)}
    assert len(budgets) > 5
    for budget, want in budgets.items():
        assert allocate.lagrangian()(curves, cfg, budget, Constraints()) == want


def test_every_mlp_keeps_its_floor():
    curves = scores_of(SMOLLM2)
    for allocator in ALLOCATORS.values():
        widths = allocator(curves, SMOLLM2, SMOLLM2.decoder_parameters // 2, Constraints(multiple_of=8, min_kept=0.3))
        assert min(w["f"] for w in widths) >= 0.3 * 1536


def test_sublayers_go_whole():
    scores = tuple({"k": np.full(3, 5.0 - i % 5), "f": np.full(1536, 9.0 + i)} for i in range(30))
    widths = allocate.sublayers(scores, SMOLLM2, SMOLLM2.decoder_parameters // 10, Constraints())
    assert {w["k"] for w in widths} == {0, 3}
    assert all(w["k"] == 0 for i, w in enumerate(widths) if i % 5 == 4)
    assert all(w["f"] == 1536 for w in widths)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: allocate.gamma(0.0), "gamma: 0.0 given"),
        (lambda: allocate.depth("cubic"), "schedule: 'cubic' given; allowed are linear and log"),
        (lambda: allocate.depth("log", 2.0), "slope: 2.0 given"),
        (lambda: allocate.lagrangian(0.0), "lagrangian: power 0.0"),
        (lambda: Constraints(min_kept=1.0), "min_kept: 1.0 given"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
