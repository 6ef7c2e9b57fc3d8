"""Plans: content, JSON, composition, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from jaxprune import models, plan
from jaxprune.models import LayerDims, LlamaConfig

CFG = LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 48), LayerDims(1, 2, 40)))
SIZES = models.unit_counts(CFG)
PLAN = plan.Plan(({"k": [1], "f": [5, 3, 4]}, {"f": []}), SIZES)


def test_indices_are_sorted_and_cannot_be_changed():
    assert PLAN.keep[0]["f"].tolist() == [3, 4, 5]
    with pytest.raises(ValueError, match="read-only"):
        PLAN.keep[0]["f"][0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.keep = ()


def test_equal_content_is_equal_and_hashes_alike():
    again = plan.Plan(({"f": [4, 5, 3], "k": [1]}, {"f": np.zeros(0, int)}), SIZES)
    other = plan.Plan(({"k": [0], "f": [3, 4, 5]}, {"f": []}), SIZES)
    assert again == PLAN and hash(again) == hash(PLAN) and other != PLAN
    assert plan.Plan.from_json(PLAN.to_json()) == PLAN


def test_ties_go_to_the_lower_index_and_no_more_than_there_is():
    assert plan.select(({"f": np.ones(4)},), ({"f": 2},)).keep[0]["f"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="layer 0: cannot keep 5 of 4 units on axis f; ask for at most 4"):
        plan.select(({"f": np.ones(4)},), ({"f": 5},))
    with pytest.raises(ValueError, match="layer 0: axis f: scores contain NaN"):
        plan.select(({"f": np.array([1, np.nan])},), ({"f": 1},))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (({"f": [48]}, {}), "layer 0: axis f: unit 48 given; allowed are 0 to 47"),
        (({"f": [-1]}, {}), "layer 0: axis f: unit -1 given"),
        (({}, {"k": [0, 0]}), "layer 1: axis k: a unit is listed twice"),
        (({"f": [1.5]}, {}), "layer 0: axis f: kept units must be a list of whole numbers"),
        (({"z": [1]}, {}), "layer 0: axis 'z' given; this layer has"),
        (({},), "1 layers in `keep` and 2 in `sizes`"),
    ],
)
def test_malformed_plans_name_the_layer(keep, message):
    with pytest.raises(ValueError, match=message):
        plan.Plan(keep, SIZES)


def test_residual_channels_are_the_same_in_every_layer():
    sizes = models.unit_counts(CFG, "kfd")
    plan.Plan(({"d": [1, 2]}, {"d": [1, 2]}), sizes)
    for second in ({"d": [1, 3]}, {}):
        with pytest.raises(ValueError, match="every layer must keep the same residual channels"):
            plan.Plan(({"d": [1, 2]}, second), sizes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a version 1 plan"),
        (json.dumps({"version": 2}), "not a version 1 plan"),
        (json.dumps({"version": 1, "sizes": [], "keep": {}}), "'keep' must be a list"),
        (json.dumps({"version": 1, "sizes": [{"f": "4"}], "keep": [{}]}), "'sizes' must hold whole numbers"),
        (json.dumps({"version": 1, "sizes": [{"f": 4}], "keep": [{"f": ["a"]}]}), "layer 0: axis f"),
        (json.dumps({"version": 1, "sizes": [{"f": 4}], "keep": [{"f": 3}]}), "layer 0: axis f"),
    ],
)
def test_text_that_is_not_a_plan(text, message):
    with pytest.raises(ValueError, match=message):
        plan.Plan.from_json(text)


def test_a_plan_of_another_model_is_refused_by_name():
    PLAN.check(CFG)
    wider = dataclasses.replace(CFG, layers=(CFG.layers[0], LayerDims(1, 2, 41)))
    with pytest.raises(ValueError, match="layer 1 has {'f': 40, 'k': 1} units in the plan and {'f': 41, 'k': 1} in the model"):
        PLAN.check(wider)
    with pytest.raises(ValueError, match="made for 2 layers, the model has 3"):
        PLAN.check(dataclasses.replace(CFG, layers=CFG.layers + CFG.layers[:1]))


def test_a_second_plan_counts_from_the_first():
    second = plan.Plan(({"f": [0, 2]}, {}), ({"k": 1, "f": 3}, {"k": 1}))
    assert PLAN.then(second).keep[0]["f"].tolist() == [3, 5]
    assert PLAN.then(second).keep[0]["k"].tolist() == [1]
