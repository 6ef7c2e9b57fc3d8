"""Fractions of zeros by layers: what they are allocated from, and that they keep bounds and meet the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import _layer_statistics as statistics
from jaxprune import layer_sparsity, models, sparsify
from jaxprune.recovery import sparse

LAYERS = (models.LayerDims(4, 1, 64),) * 3 + (models.LayerDims(0, 0, 128),)
CFG = models.LlamaConfig(vocab=64, d=64, head_dim=16, layers=LAYERS)
PARAMS = jax.tree.map(lambda x: 3 * x, models.init(jax.random.key(0), CFG))
BATCHES = list(np.asarray(jax.random.randint(jax.random.key(1), (2, 4, 24), 0, CFG.vocab)))
NAMES = sparsify.chosen(CFG, sparsify.Sparsity())


def weights(cfg=CFG, names=NAMES):
    return [sum(sparsify.size(cfg, i, n) for n in here) for i, here in enumerate(names)]


def allocated(how, params=PARAMS, names=NAMES, fraction=0.6, spread=0.08):
    return layer_sparsity.allocated(params, CFG, BATCHES, names, how, fraction, spread)


def zeros(cfg, found):
    """Of all matrices together."""
    sizes = [sparsify.size(cfg, int(name.split(".")[1]), name.split(".")[2]) for name in found]
    return np.average([m.zeros for m in found.values()], weights=sizes)


@pytest.mark.parametrize("seed", range(8))
def test_layers_stay_within_the_spread_and_meet_the_fraction(seed):
    rng = np.random.default_rng(seed)
    sizes, shares = rng.integers(10, 9999, 12), rng.pareto(0.7, 12)  # one layer has far more outliers than the others
    sizes[3] = 0
    losses = np.cumsum(rng.pareto(1.0, (12, 3)), 1)
    for found in (
        layer_sparsity.by_outliers(list(shares), sizes.tolist(), 0.6, 0.1),
        layer_sparsity.by_losses(losses, (0.5, 0.6, 0.7), sizes.tolist(), 0.6),
    ):
        assert 0.5 <= min(found) < 0.6 < max(found) <= 0.7
        np.testing.assert_allclose(np.average(found, weights=sizes), 0.6, atol=1e-9)


def test_the_order_of_outliers_is_that_of_the_weights_that_stay_and_equal_layers_are_equal():
    found = layer_sparsity.by_outliers([0.03, 0.01, 0.02, 0.01], [5, 6, 7, 8], 0.5)
    assert found[0] < found[2] < found[1] == found[3]
    assert layer_sparsity.by_outliers([0.02] * 3, [5, 6, 7], 0.5) == (0.5,) * 3


def test_where_no_bound_is_met_outliers_are_the_line_of_the_released_code():
    shares, spread = np.array([0.0, 0.6, 1.0, 0.4]), 0.08
    line = 2 * spread * (shares - shares.min()) / (shares.max() - shares.min())
    want = 1 - (line - line.mean() + (1 - 0.7))
    np.testing.assert_allclose(layer_sparsity.by_outliers(list(shares), [9] * 4, 0.7, spread), want, atol=1e-9)


def test_losses_are_least_among_all_ways_to_spread_them():
    rng, points = np.random.default_rng(0), (0.4, 0.5, 0.6)
    losses = np.exp(np.cumsum(rng.random((3, 3)), 1))
    found = layer_sparsity.by_losses(losses, points, [7, 7, 7], 0.5)

    def total(fractions):
        return sum(np.exp(np.interp(x, points, np.log(row))) for x, row in zip(fractions, losses, strict=True))

    grid = np.linspace(0.4, 0.6, 81)
    others = [(a, b, 1.5 - a - b) for a in grid for b in grid if 0.4 <= 1.5 - a - b <= 0.6]
    assert total(found) <= min(map(total, others)) * (1 + 1e-4)


def test_outliers_are_scores_above_five_times_the_mean_of_the_layer():
    x = np.asarray(PARAMS["embed"])[np.concatenate(BATCHES)]
    norms = statistics.input_norms(PARAMS, CFG, BATCHES)
    read = np.asarray(models.rms_norm(jnp.asarray(x), PARAMS["run_0"]["attn_norm"][0], CFG.norm_eps)).reshape(-1, CFG.d)
    np.testing.assert_allclose(norms[0]["k"], np.linalg.norm(read, axis=0), rtol=1e-5)
    scores = [np.abs(np.asarray(PARAMS["run_0"][n][0])).reshape(len(norms[0][n]), -1) * norms[0][n][:, None] for n in NAMES[0]]
    scores = np.concatenate([s.ravel() for s in scores])
    got = statistics.outlier_shares(PARAMS, CFG, norms, NAMES)
    np.testing.assert_allclose(got[0], (scores > 5 * scores.mean()).mean(), atol=2e-5)


def test_a_layer_with_planted_outliers_gets_fewer_zeros():
    up = PARAMS["run_0"]["up"]
    planted = PARAMS | {"run_0": PARAMS["run_0"] | {"up": up.at[1, ::3, ::3].multiply(100)}}
    found = allocated("outliers", planted)
    assert found[1] < min(x for i, x in enumerate(found) if i != 1) - 0.05


def test_the_cost_of_a_layer_is_the_divergence_from_the_dense_model():
    norms = statistics.input_norms(PARAMS, CFG, BATCHES)
    got = statistics.divergences(PARAMS, CFG, norms, NAMES, BATCHES[0], (0.25, 0.5))
    assert got.shape == (4, 2) and (got[:, 0] < got[:, 1]).all()
    masked = dict(PARAMS["run_1"])
    for n in NAMES[3]:
        w = np.asarray(masked[n][0])
        keep = sparse.wanda(w.T, np.diag(norms[3][n] ** 2), sparse.Pattern(0.5))
        masked[n] = jnp.asarray(w * np.asarray(keep).T)[None]
    p, q = (
        np.asarray(jax.nn.log_softmax(models.apply(x, jnp.asarray(BATCHES[0]), CFG), -1), np.float64)
        for x in (PARAMS, PARAMS | {"run_1": masked})
    )
    np.testing.assert_allclose(got[3, 1], (np.exp(p) * (p - q)).sum(-1).mean(), rtol=1e-3)


def test_a_layer_that_does_nothing_loses_most():
    idle = {n: PARAMS["run_0"][n].at[2].set(0) for n in ("o", "down")}
    found = allocated("sensitivity", PARAMS | {"run_0": PARAMS["run_0"] | idle})
    assert found[2] == max(found) > 0.679


@pytest.mark.parametrize("how", layer_sparsity.HOW)
@pytest.mark.parametrize("method", ["wanda", "apt"])  # which round in each row, and in each block of columns
def test_the_model_has_the_fraction_and_each_layer_its_own(how, method):
    layers = allocated(how)
    _, found = sparsify.sparsify(PARAMS, CFG, BATCHES, sparsify.Sparsity(method=method, layers=layers))
    assert len(found) == 3 * 7 + 3
    assert abs(zeros(CFG, found) - 0.6) < 5e-4
    for name, matrix in found.items():
        assert abs(matrix.zeros - layers[int(name.split(".")[1])]) <= 1.5 / 64  # a step of a row of 64


def test_equal_fractions_are_the_uniform_model():
    asked = sparsify.Sparsity(method="wanda", pattern=sparse.Pattern(0.75))
    want, found = sparsify.sparsify(PARAMS, CFG, BATCHES, asked)
    layers = sparsify.Sparsity(method="wanda", pattern=sparse.Pattern(0.75), layers=(0.75,) * 4)
    got, again = sparsify.sparsify(PARAMS, CFG, BATCHES, layers)
    assert again == found and jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), got, want))


def test_blocks_that_are_there_leave_their_debt_to_the_next(tmp_path):
    asked = sparsify.Sparsity(method="wanda", layers=(0.55, 0.61, 0.63, 0.57))
    want, found = sparsify.sparsify(PARAMS, CFG, BATCHES, asked, checkpoints=tmp_path)
    for name in ("layer_2.safetensors", "layer_3.safetensors"):
        (tmp_path / name).unlink()
    got, again = sparsify.sparsify(PARAMS, CFG, BATCHES, asked, checkpoints=tmp_path)
    assert again == found and jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), got, want))


def test_skipped_layers_count_for_nothing():
    names = sparsify.chosen(CFG, sparsify.Sparsity(skip=("layers.0", "down")))
    for how in layer_sparsity.HOW:
        found = allocated(how, names=names)
        np.testing.assert_allclose(np.average(found, weights=weights(names=names)), 0.6, atol=1e-9)


@pytest.mark.parametrize("how", layer_sparsity.HOW)
def test_mamba(how):
    cfg = models.MambaConfig(vocab=64, d=32, dt_rank=4, layers=(models.MambaDims(64),) * 3)
    params = jax.tree.map(lambda x: 2 * x, models.init(jax.random.key(0), cfg))
    names = sparsify.chosen(cfg, sparsify.Sparsity())
    found = layer_sparsity.allocated(params, cfg, BATCHES, names, how, 0.5, 0.1)
    assert 0.4 <= min(found) < max(found) <= 0.6 and abs(np.mean(found) - 0.5) < 1e-9


def test_what_cannot_be():
    for spread in (0.0, 0.4, float("nan")):
        with pytest.raises(ValueError, match="spread: .* between 0 and 0.4"):
            layer_sparsity.by_outliers([0.1, 0.2], [1, 1], 0.6, spread)
    with pytest.raises(ValueError, match="outliers, sensitivity"):
        allocated("magnitude")
    with pytest.raises(ValueError, match="at least one batch"):
        layer_sparsity.allocated(PARAMS, CFG, [], NAMES, "outliers", 0.5)
    with pytest.raises(ValueError, match="NaN"):
        allocated("sensitivity", PARAMS | {"norm": PARAMS["norm"] * np.nan})
    with pytest.raises(ValueError, match="same in every layer"):
        sparsify.Sparsity(pattern=sparse.n_of_m("2:4"), layers=(0.5,) * 4)
    with pytest.raises(ValueError, match="layers: 1.5 given"):
        sparsify.Sparsity(layers=(0.5, 1.5))
    with pytest.raises(ValueError, match="3 fractions given; the model has 4"):
        sparsify.chosen(CFG, sparsify.Sparsity(layers=(0.5,) * 3))
