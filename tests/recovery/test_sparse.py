"""One-shot sparsity on matrices: masks and weights against their definitions in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import recovery
from jaxprune.recovery import sparse
from jaxprune.recovery.sparse import pattern as pattern_of

HALF, TWO_FOUR = sparse.Pattern(0.5), sparse.n_of_m("2:4")


def problem(out=24, n=32, tokens=400, seed=0):
    """Weights, and second moments of inputs that are correlated and of different sizes."""
    rng = np.random.default_rng(seed)
    x = np.exp(rng.normal(size=(n, 1))) * ((rng.normal(size=(n, n)) + 2 * np.eye(n)) @ rng.normal(size=(n, tokens)))
    return rng.normal(size=(out, n)), x @ x.T


def plain_sparsegpt(w, gram, fraction=0.5, nm=None, block=128, damp=0.01, keep=None):
    """The loop of SparseGPT's released code in numpy, with an exact number of zeros in a block."""
    w, h = w.copy(), 2 * gram / 100
    h += damp * np.mean(np.diag(h)) * np.eye(len(h))
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    for i1 in range(0, w.shape[1], block):
        i2 = min(i1 + block, w.shape[1])
        w1, u1 = w[:, i1:i2].copy(), u[i1:i2, i1:i2]
        errors, gone = np.zeros_like(w1), np.zeros(w1.shape, bool)
        if keep is not None:
            gone = ~keep[:, i1:i2]
        elif nm is None:
            s = w1**2 / np.diag(u1) ** 2
            gone.flat[np.argsort(s, axis=None, kind="stable")[: int(s.size * fraction)]] = True
        for i in range(i2 - i1):
            if nm is not None and i % nm[1] == 0:
                s = w1[:, i : i + nm[1]] ** 2 / np.diag(u1)[i : i + nm[1]] ** 2
                np.put_along_axis(gone[:, i : i + nm[1]], np.argsort(s, 1)[:, : nm[1] - nm[0]], True, 1)
            q = np.where(gone[:, i], 0, w1[:, i])
            errors[:, i] = (w1[:, i] - q) / u1[i, i]
            w1[:, i:] -= np.outer(errors[:, i], u1[i, i:])
            w1[:, i] = q
        w[:, i1:i2] = w1
        w[:, i2:] -= errors @ u[i1:i2, i2:]
    return w


def damped(gram, damp=0.01):
    return gram + damp * np.mean(np.diag(gram)) * np.eye(len(gram))


def cost(w, new, h):
    change = np.asarray(new, np.float64) - w
    return np.sum((change @ h) * change)


@pytest.mark.parametrize("solver", ["exact", "cg"])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.8])  # systems of what goes, of both, of what stays
def test_the_exact_weights_are_the_least_squares_of_each_row(solver, fraction):
    w, gram = problem()
    keep = np.random.default_rng(1).random(w.shape) >= fraction
    got = np.asarray(sparse.compensate(w, sparse.system(gram), keep, solver=solver).w)
    want = np.zeros_like(w)
    for row, kept in enumerate(keep):
        want[row, kept] = recovery.masked_least_squares(w[row : row + 1], gram, np.flatnonzero(kept))[0]
    assert (got[~keep] == 0).all()
    scale = 1e-5 if solver == "exact" else 1e-4  # conjugate gradients stop at a residual of 1e-5
    assert np.linalg.norm(got - want) <= scale * np.linalg.norm(want)
    np.testing.assert_allclose(cost(w, got, damped(gram)), cost(w, want, damped(gram)), rtol=1e-5)


def test_a_chunk_of_one_row_gives_the_same_weights():
    w, gram = problem()
    keep = np.random.default_rng(1).random(w.shape) >= 0.5
    whole, rows = (sparse.compensate(w, sparse.system(gram), keep, solver="exact", memory=m).w for m in (2**28, 1))
    np.testing.assert_allclose(rows, whole, rtol=1e-4, atol=1e-6)


def test_the_loss_of_the_formula_is_the_loss():
    w, gram = problem()
    keep = np.random.default_rng(1).random(w.shape) >= 0.5
    new, h = sparse.compensate(w, sparse.system(gram), keep, solver="exact").w, damped(gram)
    inverse = np.linalg.inv(h)
    formula = sum(
        row[gone] @ np.linalg.solve(inverse[np.ix_(gone, gone)], row[gone])
        for row, gone in zip(w, [np.flatnonzero(~k) for k in keep], strict=True)
    )
    np.testing.assert_allclose(cost(w, new, h), formula, rtol=1e-5)


def test_one_weight_is_optimal_brain_surgeon():
    w, gram = problem(out=4)
    keep = np.ones(w.shape, bool)
    keep[np.arange(4), [3, 0, 31, 7]] = False
    new, inverse = np.asarray(sparse.compensate(w, sparse.system(gram), keep).w), np.linalg.inv(damped(gram))
    for row, j in enumerate([3, 0, 31, 7]):
        want = w[row] - w[row, j] / inverse[j, j] * inverse[j]
        np.testing.assert_allclose(np.delete(new[row], j), np.delete(want, j), atol=1e-5)
        loss = cost(w[row : row + 1], new[row : row + 1], damped(gram))
        np.testing.assert_allclose(loss, w[row, j] ** 2 / inverse[j, j], rtol=1e-5)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_the_joint_mask_of_a_group_is_that_of_brute_force(pattern):
    p = sparse.n_of_m(pattern)
    w, gram = problem(out=12, n=p.m)
    inverse = np.linalg.inv(damped(gram))
    keep = np.asarray(sparse.sparsegpt(w, sparse.system(gram), p, joint=True).keep)
    for row, kept in zip(w, keep, strict=True):
        costs = {
            gone: row[list(gone)] @ np.linalg.solve(inverse[np.ix_(gone, gone)], row[list(gone)])
            for gone in itertools.combinations(range(p.m), p.m - p.n)
        }
        assert tuple(np.flatnonzero(~kept)) == min(costs, key=costs.get)


@pytest.mark.parametrize("nm", [None, (2, 4), (4, 8)])
def test_sparsegpt_is_its_loop(nm):
    w, gram = problem(256, 512, 2000)
    pattern = HALF if nm is None else sparse.n_of_m(f"{nm[0]}:{nm[1]}")
    want = plain_sparsegpt(w, gram, nm=nm)
    with jax.enable_x64(True):
        exact = sparse.sparsegpt(w, sparse.system(gram), pattern)
        assert np.abs(np.asarray(exact.w) - want).max() <= 1e-9
    got = np.asarray(sparse.sparsegpt(w, sparse.system(gram), pattern).w)
    same = (got != 0) == (want != 0)
    assert same.mean() > 0.9999  # float32 may decide a tie of scores otherwise
    assert np.abs(got - want)[same.all(1)].max() <= 1e-4 * np.abs(want).max()


def test_sparsegpt_under_a_given_mask_and_with_a_last_block_that_is_short():
    w, gram = problem(16, 40)
    keep = np.random.default_rng(3).random(w.shape) >= 0.5
    got = sparse.sparsegpt(w, sparse.system(gram), HALF, block=16, keep=keep)
    want = plain_sparsegpt(w, gram, block=16, keep=keep)
    np.testing.assert_allclose(got.w, want, atol=1e-4)
    chosen = np.asarray(sparse.sparsegpt(w, sparse.system(gram), HALF, block=16).keep)
    assert [(~chosen[:, i : i + 16]).sum() for i in (0, 16, 32)] == [128, 128, 64]


@pytest.mark.parametrize("pattern", [HALF, TWO_FOUR, sparse.Pattern(0.7)])
def test_the_same_mask_exact_then_sparsegpt_then_no_update(pattern):
    w, gram = problem(64, 96)
    s, h = sparse.system(gram), damped(gram)
    keep = sparse.wanda(w, gram, pattern)
    exact, greedy = sparse.compensate(w, s, keep).w, sparse.sparsegpt(w, s, pattern, keep=keep).w
    losses = [cost(w, new, h) for new in (exact, greedy, w * np.asarray(keep))]
    assert losses[0] < losses[1] < losses[2]


def test_joint_masks_cost_less_where_neighbours_are_alike():
    total = dict.fromkeys(("MM", "SM", "MS", "SS"), 0.0)
    for seed in range(3):  # a group's mask is the best for the group, not for the row: only sums are in order
        w, _ = problem(64, 96, seed=seed)
        rng = np.random.default_rng(seed)
        own, shared = rng.normal(size=(96, 400)), np.repeat(rng.normal(size=(24, 400)), 4, 0)
        x = np.exp(rng.normal(size=(96, 1)) / 2) * ((rng.normal(size=(96, 96)) / 10 + np.eye(96)) @ (own + shared))
        s = sparse.system(x @ x.T)
        for variant in total:
            total[variant] += sparse.relative_loss(w, sparse.apt(w, s, TWO_FOUR, variant).w, x @ x.T)
    assert total["MM"] < total["SM"] < total["MS"] < total["SS"]


@pytest.mark.parametrize("pattern", [HALF, TWO_FOUR])
def test_methods_with_their_own_masks(pattern):
    w, gram = problem(64, 96)
    s = sparse.system(gram)
    new = [sparse.apt(w, s, pattern, v).w for v in ("SM", "SS")]
    new += [w * np.asarray(sparse.wanda(w, gram, pattern)), w * np.asarray(sparse.keep_largest(jnp.abs(w), pattern))]
    losses = [sparse.relative_loss(w, x, gram) for x in new]
    assert losses == sorted(losses)
    assert all(abs((np.asarray(x) == 0).mean() - 0.5) < 1e-9 and not sparse.violations(x, pattern) for x in new)


def test_ss_is_sparsegpt_and_blocks_of_columns_cost_less():
    w, gram = problem(64, 96)
    s = sparse.system(gram)
    assert (sparse.apt(w, s, HALF, "SS").w == sparse.sparsegpt(w, s, HALF).w).all()
    for pattern, variant in [(HALF, "SM"), (TWO_FOUR, "MM")]:
        once, often = (sparse.apt(w, s, pattern, variant, block=b) for b in (None, 32))
        assert cost(w, often.w, damped(gram)) < cost(w, once.w, damped(gram))
        assert (np.asarray(often.w) == 0).mean() == 0.5 and not sparse.violations(often.w, pattern)


def test_zeros_per_row():
    w, gram = problem()
    s = sparse.system(gram)
    for done in (sparse.apt(w, s, HALF, "SM", per_row=True), sparse.apt(w, s, HALF, "SS", per_row=True)):
        assert ((np.asarray(done.w) == 0).sum(1) == 16).all()
    assert (np.asarray(sparse.wanda(w, gram, sparse.Pattern(0.25))).sum(1) == 24).all()


@pytest.mark.parametrize("columns", [3, 16, 17, 400])  # 16 are compared with each other
def test_the_smallest_go_and_of_equal_ones_those_in_front(columns):
    rng = np.random.default_rng(columns)
    scores = rng.integers(-3, 4, (5, columns)).astype(np.float32)  # most are equal to another
    scores[0, 0], scores[1, 0], scores[2, :] = np.inf, -np.inf, 0.5
    order = np.argsort(scores, 1, kind="stable")
    want = np.empty_like(order)
    np.put_along_axis(want, order, np.arange(columns)[None].repeat(5, 0), 1)
    for count in (0, 1, columns // 2, columns):
        np.testing.assert_array_equal(pattern_of.above(jnp.asarray(scores), count), want >= count)


def test_alternating_directions_reach_the_exact_loss():
    w, gram = problem()
    keep = np.random.default_rng(1).random(w.shape) >= 0.5
    exact = sparse.compensate(w, sparse.system(gram, 0.0), keep, solver="exact").w
    np.testing.assert_allclose(cost(w, recovery.admm(w, gram, keep, iterations=400), gram), cost(w, exact, gram), rtol=1e-4)


@pytest.mark.parametrize("variant", sparse.VARIANTS)
def test_inputs_that_were_never_seen_go_first_and_nothing_else_changes_for_them(variant):
    w, gram = problem(n=16)
    gram[[3, 7]] = gram[:, [3, 7]] = 0
    s = sparse.system(gram)
    done = sparse.apt(w, s, TWO_FOUR, variant)
    assert np.isfinite(done.w).all() and done.notes == ("2 of 16 inputs were always zero",)
    assert not np.asarray(done.keep)[:, [3, 7]].any()


def test_nothing_seen_at_all_keeps_the_largest_weights():
    w, _ = problem()
    done = sparse.apt(w, sparse.system(np.zeros((32, 32))), HALF, "SM")
    assert np.asarray(done.keep).mean() == 0.5
    np.testing.assert_allclose(done.w, np.where(done.keep, w, 0), rtol=1e-6)


@pytest.mark.parametrize("damp", [0.0, 0.01])
@pytest.mark.parametrize("variant", sparse.VARIANTS)
def test_moments_without_rank_give_finite_weights_and_the_fallback_is_named(variant, damp):
    w, gram = problem(tokens=5)
    s = sparse.system(np.float32(gram), damp)
    assert (s.notes == ()) == (damp > 0) and all("damping raised from 0" in note for note in s.notes)
    done = sparse.apt(jnp.bfloat16(w), s, TWO_FOUR, variant)
    assert np.isfinite(done.w).all() and (np.asarray(done.w) == 0).mean() == 0.5
    plain = np.where(done.keep, w, 0)
    assert sparse.relative_loss(w, done.w, gram) < sparse.relative_loss(w, plain, gram)


def test_what_cannot_be():
    w, gram = problem()
    gram[2, 2] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        sparse.system(gram)
    with pytest.raises(ValueError, match="damp"):
        sparse.system(np.eye(4), -1.0)
    s = sparse.system(np.eye(32))
    with pytest.raises(ValueError, match="SS, SM, MS, MM"):
        sparse.apt(w, s, HALF, "S")
    with pytest.raises(ValueError, match="joint mask"):
        sparse.apt(w, s, HALF, "MM")
    with pytest.raises(ValueError, match="auto, exact, cg"):
        sparse.compensate(w, s, w > 0, solver="lu")
    for text in ("2", "4:4", "0:4", "a:b", "2:99"):
        with pytest.raises(ValueError, match="nm:"):
            sparse.n_of_m(text)


@pytest.mark.parametrize("seed", [2, 4, 5])
def test_rows_that_are_done_stay_finite_while_others_go_on(seed):
    """A row of few weights is done after as many steps; going on, its residual gets so small that quotients are not finite."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(64, 64)) * np.logspace(0, -3, 64)[:, None]
    x = rng.normal(size=(64, 64)) @ x
    w = rng.normal(size=(240, 64))
    w[:200] *= 10.0 ** -rng.uniform(0, 22, (200, 1))
    keep = rng.random((240, 64)) < 0.5
    keep[:200] = np.arange(64) < np.resize([2, 3, 4, 5, 8], 200)[:, None]
    system = sparse.system(x @ x.T, 1e-6)
    found, exact = (np.asarray(sparse.compensate(w, system, keep, solver=solver).w) for solver in ("cg", "exact"))
    largest = np.abs(exact).max(1, keepdims=True)
    np.testing.assert_allclose(found[:200] / largest[:200], exact[:200] / largest[:200], atol=1e-2)
    assert np.isfinite(found).all()
