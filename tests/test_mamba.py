"""Mamba pruned and made sparse: a cut is the masked model, each matrix is fitted on what the ones before it pass on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune import models, plan, proof, sparsify, surgery
from jaxprune.models import mamba
from jaxprune.recovery import sparse

CFG = models.MambaConfig(vocab=64, d=32, dt_rank=8, state=4, layers=(models.MambaDims(48),) * 2)
PARAMS = jax.tree.map(
    lambda x: x + 0.1 * np.random.default_rng(x.size).standard_normal(x.shape).astype(np.float32),
    models.init(jax.random.key(0), CFG),
)
TOKENS = np.random.default_rng(1).integers(0, CFG.vocab, (4, 24), np.int32)


@pytest.fixture(scope="module")
def kept():
    rng = np.random.default_rng(2)
    keep = tuple({"i": rng.permutation(dims.inner)[:n]} for dims, n in zip(CFG.layers, (16, 1), strict=True))
    return plan.Plan(keep, models.unit_counts(CFG))


def test_a_cut_is_the_masked_model(kept):
    small, cfg = surgery.cut(PARAMS, CFG, kept)
    assert [dims.inner for dims in cfg.layers] == [16, 1]
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, models.shapes(cfg))
    report = proof.verify(PARAMS, CFG, small, cfg, kept, TOKENS)
    assert report.exact and not report.updated and report.difference <= 1e-5 * report.largest_logit
    again, _ = surgery.cut(surgery.widen(small, CFG, kept), CFG, kept)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again, small))


def test_what_changed_after_the_cut_is_found(kept):
    small, cfg = surgery.cut(PARAMS, CFG, kept)
    small["run_0"]["A_log"] = small["run_0"]["A_log"] + 0.1
    report = proof.verify(PARAMS, CFG, small, cfg, kept, TOKENS)
    assert not report.exact and report.undeclared == ("layers.0.A_log",)


def test_costs_of_units_are_the_parameters_that_go(kept):
    _, cfg = surgery.cut(PARAMS, CFG, kept)
    gone = sum(
        cost["i"] * (size["i"] - len(keep["i"]))
        for cost, size, keep in zip(models.unit_costs(CFG), kept.sizes, kept.keep, strict=True)
    )
    assert CFG.decoder_parameters - cfg.decoder_parameters == gone


@pytest.mark.parametrize("ranking", ["global", "linear"])
def test_rankings_meet_the_ratio(ranking):
    settings = jaxprune.Settings(method="magnitude", ratio=0.4, units=("inner",), ranking=ranking, multiple_of=1)
    found = jaxprune.prune(PARAMS, CFG, None, settings)
    assert abs(1 - found.cfg.decoder_parameters / CFG.decoder_parameters - 0.4) < 0.01
    assert len({dims.inner for dims in found.cfg.layers}) > 1 and "transformers cannot load it" in found.notes[0]


def test_the_residual_stream_is_not_cut():
    keep = tuple({"d": np.arange(8)} for _ in CFG.layers)
    with pytest.raises(ValueError, match="axis d given for a Mamba"):
        surgery.cut(PARAMS, CFG, plan.Plan(keep, models.unit_counts(CFG, "id")))
    with pytest.raises(ValueError, match="keeps at least 1"):
        surgery.cut(PARAMS, CFG, plan.Plan(({"i": []}, {}), models.unit_counts(CFG)))


@pytest.mark.parametrize(
    ("cfg", "options", "message"),
    [
        (CFG, dict(method="taylor"), "units: kv,mlp given; a model of family mamba has inner"),
        (CFG, dict(method="taylor", units=("inner",), ranking="gamma"), "for Mamba there are local"),
        (CFG, dict(method="taylor", units=("inner",), reconstruct="bias"), "reconstruct: bias given"),
        (CFG, dict(method="taylor", units=("inner",), max_distinct=1), "max_distinct: 1 given"),
        (None, dict(method="taylor", units=("inner",)), "a model of family llama has kv, mlp"),
    ],
)
def test_settings_for_another_architecture(tiny, cfg, options, message):
    with pytest.raises(ValueError, match=message):
        jaxprune.prune(PARAMS, cfg or tiny.cfg, TOKENS, jaxprune.Settings(**options))


def test_each_matrix_is_fitted_on_what_the_sparse_matrices_before_it_pass_on():
    asked = sparsify.Sparsity(method="wanda")
    new, found = sparsify.sparsify(PARAMS, CFG, [TOKENS[:2], TOKENS[2:]], asked)
    assert found.keys() == {f"layers.{i}.{n}" for i in range(2) for n in ("in_proj", "x_proj", "dt_proj", "out_proj")}
    x = mamba.embedded(new, jnp.asarray(TOKENS), CFG)
    x, _ = mamba.block({n: a[0] for n, a in new["run_0"].items()}, x, CFG)
    p = {n: a[1] for n, a in new["run_0"].items()}
    z = np.asarray(mamba.inputs(p, x, CFG)[0]["out_proj"]).reshape(-1, 48)
    w = np.asarray(PARAMS["run_0"]["out_proj"][1]).T
    keep = sparse.wanda(w, z.T @ z, asked.pattern)
    np.testing.assert_array_equal(np.asarray(new["run_0"]["out_proj"][1]).T, np.where(keep, w, 0))
    for name in ("conv1d", "A_log", "D", "dt_proj_bias", "mixer_norm"):
        assert new["run_0"][name] is PARAMS["run_0"][name]


def test_joint_fits_keep_the_pattern_and_blocks_are_written(tmp_path):
    errors = {}
    for method in ("wanda", "apt"):
        asked = sparsify.Sparsity(method=method, pattern=sparse.n_of_m("2:4"))
        (tmp_path / method).mkdir()
        new, found = sparsify.sparsify(PARAMS, CFG, [TOKENS], asked, checkpoints=tmp_path / method)
        assert set(sparsify.achieved(new, CFG, list(found), asked.pattern).values()) == {(0.5, 0)}
        errors[method] = found["layers.0.in_proj"].error
    assert errors["apt"] < errors["wanda"]
    assert sorted(path.name for path in (tmp_path / "apt").iterdir()) == ["layer_0.safetensors", "layer_1.safetensors"]


def test_inputs_that_n_of_m_does_not_divide():
    cfg = dataclasses.replace(CFG, dt_rank=3)
    with pytest.raises(ValueError, match="layers.0.dt_proj has 3 inputs, which 4 does not divide; --skip dt_proj"):
        sparsify.chosen(cfg, sparsify.Sparsity(pattern=sparse.n_of_m("2:4")))
    found = sparsify.chosen(cfg, sparsify.Sparsity(pattern=sparse.n_of_m("2:4"), skip=("dt_proj",)))
    assert found == (("in_proj", "x_proj", "out_proj"),) * 2
