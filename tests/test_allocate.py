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
@pytest.mark.parametrize("allocator", [allocate.local, allocate.global_])
@pytest.mark.parametrize("multiple_of", [1, 8])
def test_the_budget_is_met_within_half_a_point(ratio, allocator, multiple_of):
    constraints = Constraints(multiple_of=multiple_of)
    widths = allocator(scores_of(SMOLLM2), SMOLLM2, round(ratio * SMOLLM2.decoder_parameters), constraints)
    assert abs(allocate.removed(SMOLLM2, widths) / SMOLLM2.decoder_parameters - ratio) < 0.005
    assert all(w["k"] >= 1 and w["f"] >= multiple_of and w["f"] % multiple_of == 0 for w in widths)


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
        (dict(units="kz"), "units: 'kz' given; allowed are"),
        (dict(layers=(5, 5)), "layers: 5:5 given; this model has layers 0:30"),
        (dict(layers=(0, 31)), "layers: 0:31 given"),
    ],
)
def test_constraints_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Constraints(**options).chosen(SMOLLM2)
