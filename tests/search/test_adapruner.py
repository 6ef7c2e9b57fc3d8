import importlib.util
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jaxprune import models, pipeline, plan, scorers
from jaxprune.search import _metrics, fitness
from jaxprune.search.adapruner import adapruner, informative

SCRIPT = Path(__file__).with_name("tiny_search.py")
SUBSET = (0, 3, 7, 10)  # a subset that is not in one piece


class Found(NamedTuple):
    params: Any
    cfg: Any
    pool: Any
    of: Any


@pytest.fixture(scope="module")
def tiny_search():
    spec = importlib.util.spec_from_file_location("tiny_search", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(tiny_search):
    """A model with grouped queries, windows, and their statistics."""
    params, cfg, pool = tiny_search.PARAMS, tiny_search.CFG, tiny_search.POOL
    return Found(params, cfg, pool, _metrics.statistics(params, cfg, pool))


def raising(error):
    def stop(plans):
        raise error

    return stop


KINDS = dict(abs="param_first", square="param_second", mix="param_mix", sum="vectorize")


@pytest.mark.parametrize("kind", KINDS)
def test_the_scores_of_llm_pruner_are_points_of_the_space(found, kind):
    """Of the statistics of any subset, under any aggregation."""
    params, cfg, pool, of = found
    probes, variant = models.probes(cfg), KINDS[kind]
    widths = tuple({a: n // 2 for a, n in layer.items()} for layer in models.unit_counts(cfg, "kf"))
    scorer = scorers.taylor(models.loss_fn(cfg), variant)
    update = jax.jit(scorer.update)
    for subset in (SUBSET, (1, 3, 4, 2)):
        theirs = update(scorer.init(probes), params, probes, pool[list(subset)])
        ours, expected = jax.device_get((of(kind, subset), theirs.value()))
        assert jax.tree.structure(ours) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * abs(b).max())
        for how in ("sum", "mean", "max", "prod"):
            metric = _metrics.LLM_PRUNER[variant]._replace(aggregate="sum" if how == "mean" else how)  # the same order
            scores = _metrics.score(lambda kind, subset=subset: of(kind, subset), metric)
            kept = plan.select(scorers.taylor(models.loss_fn(cfg), variant, how).finalize(theirs), widths)
            assert plan.select(scores, widths) == kept


def test_blends_lie_between_their_ends(found):
    def score(*metric):
        scores = scorers.normalize(0.0)(_metrics.score(lambda kind: found.of(kind, SUBSET), _metrics.Metric(*metric)))
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(scores)])

    first, second, vector = score("first"), score("second"), score("first", 0.0, 1.0)
    np.testing.assert_allclose(score("blend", 0.25), 0.75 * first + 0.25 * second, rtol=1e-5)
    np.testing.assert_allclose(score("first", 0.0, 0.25), 0.75 * first + 0.25 * vector, rtol=1e-5)
    np.testing.assert_allclose(score("blend", 1.0), second, rtol=1e-5)
    np.testing.assert_array_equal(score("second", 0.0, 1.0), second)
    assert np.isfinite(score("blend", 0.5, 0.5, "prod")).all()


def test_an_unknown_order_is_refused(found):
    with pytest.raises(ValueError, match="order: 'third' given; allowed are first, second, mix, blend"):
        _metrics.score(lambda kind: found.of(kind, SUBSET), _metrics.Metric("third"))


def test_trial_0_is_llm_pruner_on_the_first_windows(found, tmp_path):
    params, cfg, pool, _ = found
    settings = pipeline.Settings(method="taylor", ratio=0.3)
    theirs = pipeline.prune(params, cfg, pool[:4], settings)

    def plan_of(scores):
        return plan.select(scores, tuple({a: len(x) for a, x in layer.items()} for layer in theirs.plan.keep))

    loss_of = fitness.gate_fitness(params, cfg, pool[8:], devices=jax.devices()[:1])
    seen = []
    points = adapruner(
        params, cfg, pool, loss_of, plan_of, study=tmp_path / "study.db", trials=4, subset_size=4,
        on_trial=lambda number, point: seen.append((number, point)),
    )  # fmt: skip
    assert points[0].plan == theirs.plan and points[0].loss == loss_of([theirs.plan])[0]
    assert points[0].cost == theirs.cfg.decoder_parameters
    assert list(enumerate(points)) == seen and len({p.origin.split(":")[1] for p in points}) > 1


def test_a_killed_search_finds_what_an_uninterrupted_one_finds(tiny_search, tmp_path):
    study = tmp_path / "killed #1?.db"
    with pytest.raises(KeyboardInterrupt):
        tiny_search.search(study, raising(KeyboardInterrupt()))  # in trial 0
    done = subprocess.run([sys.executable, "-W", "error", SCRIPT, study, "4"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")  # in a trial of the estimator
    new = []
    resumed = tiny_search.search(study, on_trial=lambda number, point: new.append(number))
    assert new[0] >= 4 and new[-1] == 7
    whole = tiny_search.search(tmp_path / "whole.db")
    assert resumed == whole and len(whole) == 8
    assert whole[0].origin == "trial 0: first order, elements, sum, subset 0"


def test_a_finished_search_measures_nothing_and_a_longer_one_goes_on(tiny_search, tmp_path):
    measured = []

    def fitness(plans):
        measured.extend(plans)
        return tiny_search.losses(plans)

    short = tiny_search.search(tmp_path / "study.db", fitness, trials=4)
    before = len(measured)
    assert tiny_search.search(tmp_path / "study.db", fitness, trials=4) == short and len(measured) == before
    assert tiny_search.search(tmp_path / "study.db", fitness) == tiny_search.search(tmp_path / "whole.db")
    assert len(measured) == len(set(measured))  # a plan that came up before is not measured again


def test_a_loss_that_is_not_finite_is_a_bad_one(tiny_search, tmp_path):
    points = tiny_search.search(tmp_path / "study.db", lambda plans: np.full(len(plans), np.inf), trials=5)
    assert [p.loss for p in points] == [np.inf] * 5


def test_a_study_of_other_settings_is_refused(tiny_search, tmp_path):
    def narrow(scores):
        return plan.select(scores, ({"k": 1, "f": 8},) * 2)

    study = tmp_path / "study.db"
    tiny_search.search(study, trials=1, settings=dict(ratio=0.5))
    for changed, difference in (
        (dict(seed=1), "seed was 0, now 1"),
        (dict(subsets=5), "subsets was 4, now 5"),
        (dict(settings=dict(ratio=0.4)), "ratio was 0.5, now 0.4"),
        (dict(settings={}), "ratio was 0.5, now absent"),
        (dict(plan_of=narrow), "allocation was"),
    ):
        options = dict(trials=1, settings=dict(ratio=0.5)) | changed
        with pytest.raises(ValueError, match=f"a study with other settings .*{difference}"):
            tiny_search.search(study, **options)


def test_what_is_no_study_is_left_alone(tiny_search, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not a study, but a long enough text")
    with pytest.raises(ValueError, match="is no SQLite file"):
        tiny_search.search(text)
    assert text.read_text().startswith("not a study")
    with pytest.raises(IsADirectoryError):
        tiny_search.search(tmp_path)


def test_optuna_is_an_extra(tiny_search, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxprune\[search\]'"):
        tiny_search.search(tmp_path / "study.db")


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(trials=0), "trials: 0 given"),
        (dict(subset_size=0), "subset_size: 0 given"),
        (dict(keep=0.0), "keep: 0.0 given"),
        (dict(subset_size=10), "pool: 12 windows given of which 9 with enough information; a subset takes 10"),
        (dict(subset_size=13, subsets=1), "pool: 12 windows given; a subset takes 13"),
    ],
)
def test_numbers_out_of_range(tiny_search, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        tiny_search.search(tmp_path / "study.db", **options)
    assert not list(tmp_path.iterdir())


def test_repetitive_windows_are_dropped():
    pool = np.array([[7] * 8, range(8), [1, 2] * 4, range(8, 16)])
    assert informative(pool, 0.5).tolist() == [1, 3]
    assert informative(pool, 1.0).tolist() == [0, 1, 2, 3]
