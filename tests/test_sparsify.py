"""Sparsity of a whole model: what each matrix is fitted on, and that blocks that are done are not done again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import models, sparsify
from jaxprune.models.axes import INPUT
from jaxprune.recovery import sparse

LAYERS = (models.LayerDims(4, 1, 32),) * 3 + (models.LayerDims(0, 0, 32),)  # every matrix is [32, 32]: few programs to compile
CFG = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=LAYERS)
PARAMS = jax.tree.map(lambda x: 3 * x, models.init(jax.random.key(0), CFG))
BATCHES = list(np.asarray(jax.random.randint(jax.random.key(1), (2, 8, 24), 0, CFG.vocab)))


def matrix(params, layer, name):
    """[out, in]."""
    run = next(r for r in CFG.runs if r.start <= layer < r.start + r.length)
    x = np.asarray(params[run.name][name][layer - run.start])
    return x.reshape(np.prod(x.shape[: len(INPUT[name])], dtype=int), -1).T


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        ("magnitude", sparse.Pattern(0.75)),
        ("wanda", sparse.n_of_m("2:4")),
        ("sparsegpt", sparse.Pattern(0.75)),
        ("apt", sparse.n_of_m("2:4")),
    ],
)
def test_every_matrix_has_the_pattern_and_nothing_else_changes(method, pattern):
    new, found = sparsify.sparsify(PARAMS, CFG, BATCHES, sparsify.Sparsity(method=method, pattern=pattern))
    assert len(found) == 3 * 7 + 3
    for name, (zeros, violations) in sparsify.achieved(new, CFG, list(found), pattern).items():
        assert zeros == pattern.fraction and violations == 0
        assert (zeros, violations) == (found[name].zeros, found[name].violations)
    for name in ("embed", "norm", "head"):
        assert new[name] is PARAMS[name]
    assert new["run_0"]["attn_norm"] is PARAMS["run_0"]["attn_norm"]


def test_each_matrix_is_fitted_on_what_the_sparse_matrices_before_it_pass_on():
    asked = sparsify.Sparsity(method="wanda")
    new, found = sparsify.sparsify(PARAMS, CFG, BATCHES, asked)
    layer = 1  # the stream into it, then its down projection with all matrices before it sparse
    x = new["embed"][np.concatenate(BATCHES)]
    for i in range(layer):
        p = {n: a[i] for n, a in new["run_0"].items()}
        x = models.sublayer(p, "down", models.sublayer(p, "o", x, CFG), CFG)
    p = {n: a[layer] for n, a in new["run_0"].items()}
    z = np.asarray(models.reads(p, "down", models.sublayer(p, "o", x, CFG), CFG)).reshape(-1, 32)
    w = matrix(PARAMS, layer, "down")
    keep = sparse.wanda(w, z.T @ z, asked.pattern)
    np.testing.assert_array_equal(matrix(new, layer, "down"), np.where(keep, w, 0))
    error = sparse.relative_loss(w, matrix(new, layer, "down"), z.T @ z)
    np.testing.assert_allclose(found["layers.1.down"].error, error, rtol=1e-4)


def test_methods_in_order_of_the_error_of_the_first_matrices():
    def error(method, **options):
        _, found = sparsify.sparsify(PARAMS, CFG, BATCHES, sparsify.Sparsity(method=method, **options))
        return sum(found[f"layers.0.{n}"].error for n in "qkv")  # all methods read the same there

    nm = sparse.n_of_m("2:4")
    assert error("apt") < error("sparsegpt") < error("wanda")
    assert error("apt", pattern=nm) < error("sparsegpt", pattern=nm) < error("wanda", pattern=nm)


def test_bfloat16_weights_stay_bfloat16_and_keep_their_zeros():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    new, found = sparsify.sparsify(params, CFG, BATCHES, sparsify.Sparsity())
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(new))
    assert all(np.isfinite(m.error) and m.zeros >= 0.5 for m in found.values())


def test_blocks_that_are_there_are_not_done_again(tmp_path, monkeypatch):
    asked = sparsify.Sparsity(method="sparsegpt")
    want, found = sparsify.sparsify(PARAMS, CFG, BATCHES, asked, checkpoints=tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"layer_{i}.safetensors" for i in range(4)]
    (tmp_path / "layer_3.safetensors").unlink()
    done, block = [], sparsify._block

    def counted(p, *rest):
        done.append(p)
        return block(p, *rest)

    monkeypatch.setattr(sparsify, "_block", counted)
    got, again = sparsify.sparsify(PARAMS, CFG, BATCHES, asked, checkpoints=tmp_path)
    assert len(done) == 1 and again == found
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), got, want))


def test_skipped_matrices_stay_dense():
    asked = sparsify.Sparsity(method="magnitude", skip=("down", "layers.0", "layers.1.q"))
    new, found = sparsify.sparsify(PARAMS, CFG, BATCHES, asked)
    assert found.keys() == {*(f"layers.1.{n}" for n in ("k", "v", "o", "gate", "up"))} | {
        *(f"layers.2.{n}" for n in ("q", "k", "v", "o", "gate", "up")), "layers.3.gate", "layers.3.up",
    }  # fmt: skip
    for run, array, layers in (("run_0", "q", 2), ("run_0", "o", 1), ("run_0", "down", 3), ("run_1", "down", 1)):
        assert (new[run][array][:layers] == PARAMS[run][array][:layers]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="best"), "magnitude, wanda, sparsegpt, apt"),
        (dict(pattern=sparse.Pattern(1.0)), "between 0 and 1"),
        (dict(variant="MM"), "joint mask needs --nm"),
        (dict(method="wanda", variant="SM"), "for --method apt"),
        (dict(block=0), "number of columns"),
        (dict(skip=("layers.9",)), "layers.0 to layers.3"),
        (dict(skip=("layers.3.q",)), "'layers.3.q' given"),
        (dict(skip=("q", "k", "v", "o", "gate", "up", "down")), "leaves no matrix"),
        (dict(pattern=sparse.n_of_m("2:12")), "which 12 does not divide"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        sparsify.chosen(CFG, sparsify.Sparsity(**options))


def test_tokens_are_needed():
    with pytest.raises(ValueError, match="at least one batch"):
        sparsify.sparsify(PARAMS, CFG, [], sparsify.Sparsity())
