"""The choice of calibration data against divergences computed from all logits at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import calibration_choice, models, plan, scorers, surgery

CFG = models.LlamaConfig(vocab=32, d=16, head_dim=4, layers=(models.LayerDims(2, 2, 12),) * 2)
PARAMS = jax.tree.map(lambda x: 10 * x, models.init(jax.random.key(0), CFG))
HELD_OUT = jax.random.randint(jax.random.key(1), (4, 9), 0, CFG.vocab)
CANDIDATES = list(jax.random.randint(jax.random.key(2), (3, 2, 6), 0, CFG.vocab))
SCORER = scorers.taylor(models.loss_fn(CFG))


def prune(tokens):
    scores = scorers.score(SCORER, PARAMS, models.probes(CFG), [tokens])
    return surgery.gates_of(plan.select(scores, ({"k": 1, "f": 6},) * 2), CFG)


def divergence(params, probes):
    """From logits of all positions, in float64."""
    p, q = (np.asarray(models.apply(params, HELD_OUT, CFG, x), np.float64) for x in ({}, probes))
    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (p, q))
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    return (p * np.log(p / q)).sum(-1)


@pytest.mark.parametrize("options", [{}, dict(microbatch=2, chunk=7)])
def test_the_candidate_of_least_divergence_is_chosen(options):
    choice = calibration_choice.choose(CANDIDATES, prune, PARAMS, CFG, HELD_OUT, **options)
    want = [divergence(PARAMS, prune(tokens)).mean() for tokens in CANDIDATES]
    np.testing.assert_allclose(choice.kl, want, rtol=1e-4)
    assert choice.best == int(np.argmin(want)) and max(want) > 1.01 * min(want)


def test_gates_that_keep_everything_win_with_no_divergence():
    keep = [surgery.gates_of(plan.Plan(({"f": range(n)},) * 2, models.unit_counts(CFG)), CFG) for n in (3, 12, 12)]
    choice = calibration_choice.choose(keep, lambda gates: gates, PARAMS, CFG, HELD_OUT)
    assert choice.best == 1 and abs(choice.kl[1]) < 1e-6 < choice.kl[0]


def test_no_program_is_compiled_anew_for_another_candidate():
    traces = []

    def gates(n):
        return surgery.gates_of(plan.Plan(({"f": range(n)},) * 2, models.unit_counts(CFG)), CFG)

    def counted(*args, **kwargs):
        traces.append(1)
        return models.token_kl(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration_choice, "token_kl", counted)
        calibration_choice.choose([3, 5, 7], gates, PARAMS, CFG, HELD_OUT)
    assert len(traces) == 1


def test_divergence_of_each_token():
    probes = prune(CANDIDATES[0])
    x, y = models.hidden(PARAMS, HELD_OUT, CFG), models.hidden(PARAMS, HELD_OUT, CFG, probes)
    for chunk in (1, 5, 256):
        got = models.token_kl(PARAMS, x, PARAMS, y, CFG, chunk)
        np.testing.assert_allclose(got, divergence(PARAMS, probes), rtol=1e-3, atol=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match="candidates: none given; give at least one"):
        calibration_choice.choose([], prune, PARAMS, CFG, HELD_OUT)
    broken = jax.tree.map(lambda x: x * jnp.nan, models.probes(CFG)["gates"])
    with pytest.raises(ValueError, match="candidate 1: its divergence is nan; check the weights"):
        calibration_choice.choose([0, 1], lambda i: [{}, {"gates": broken}][i], PARAMS, CFG, HELD_OUT)
