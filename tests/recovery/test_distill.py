"""Distillation against its definitions, on a tiny teacher and a student that was cut from it."""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune import models, recovery, surgery
from jaxprune.plan import Plan

KEEP = ({"k": [1], "f": range(0, 48, 2)}, {"k": [0], "f": range(30)}, {})
OPTIONS: dict[str, dict[str, Any]] = dict(
    forward={},
    reverse_soft=dict(reverse=True, temperature=3.0),
    top=dict(top_k=5, temperature=3.0),
    reverse_top=dict(top_k=5, reverse=True),
    hidden=dict(hidden_weight=1.0),
)


class Case(NamedTuple):
    """A teacher that is sure of itself, its pruned student and tokens with weights, some of them zero."""

    cfg: Any
    teacher_cfg: Any
    pair: Any
    batch: Any


@pytest.fixture(scope="module")
def case(tiny):
    teacher = jax.tree.map(lambda x: 5 * x, tiny.params)
    plan = Plan(tuple({a: list(x) for a, x in keep.items()} for keep in KEEP), models.unit_counts(tiny.cfg))
    student, cfg = surgery.cut(teacher, tiny.cfg, plan)
    weights = jnp.ones(tiny.tokens.shape).at[0, 7:].set(0)
    return Case(cfg, tiny.cfg, recovery.Pair(student, teacher), dict(tokens=tiny.tokens, weights=weights))


def batches(step, b=8, t=12):
    rng = np.random.default_rng(step)
    lengths = np.array([12, 1, 7, 12, 0, 2, 9, 12])[:, None]
    return dict(tokens=rng.integers(0, 64, (b, t), np.int32), weights=(np.arange(t) < lengths).astype(np.float32))


def log_softmax(z):
    z = np.asarray(z, np.float64)
    return z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)


def logits(case):
    """Of teacher and student at the positions that predict a token."""
    tokens = case.batch["tokens"][:, :-1]
    apply = jax.jit(models.apply, static_argnames="cfg")
    return [apply(case.pair.teacher, tokens, cfg=case.teacher_cfg), apply(case.pair.student, tokens, cfg=case.cfg)]


def divergence(case, **options):
    @jax.jit
    def of(student, teacher, tokens):
        x, y = models.hidden(student, tokens, case.cfg), models.hidden(teacher, tokens, case.teacher_cfg)
        return recovery.logit_divergence(student, x, case.cfg, teacher, y, case.teacher_cfg, **options)

    return of(*case.pair, case.batch["tokens"][:, :-1])


def value(loss, case):
    return jax.jit(loss)(case.pair.student, case.pair, case.batch)[0]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(case, options):
    loss = recovery.distill_loss(case.teacher_cfg, case.teacher_cfg, alpha=None, **options)
    grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    teacher = case.pair.teacher
    (value, weight), at_teacher = grad(teacher, recovery.Pair(teacher, teacher), case.batch)
    assert abs(value) < 1e-6 and weight == case.batch["weights"][:, 1:].sum()
    other = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), teacher)
    (value, _), elsewhere = grad(other, recovery.Pair(teacher, teacher), case.batch)
    assert value > 1e-2 and optax.tree.norm(at_teacher) < 1e-4 * optax.tree.norm(elsewhere)


@pytest.mark.parametrize(("reverse", "temperature"), [(False, 1.0), (True, 2.5)])
def test_the_loss_is_its_formula(case, reverse, temperature):
    p, q = (log_softmax(np.asarray(z) / temperature) for z in logits(case))
    p, q = (q, p) if reverse else (p, q)
    tokens = temperature**2 * (np.exp(p) * (p - q)).sum(-1)
    weights = np.asarray(case.batch["weights"])[:, 1:]
    loss = recovery.distill_loss(case.cfg, case.teacher_cfg, alpha=None, reverse=reverse, temperature=temperature)
    np.testing.assert_allclose(value(loss, case), (weights * tokens).sum() / weights.sum(), rtol=1e-4)
    np.testing.assert_allclose(divergence(case, reverse=reverse, temperature=temperature), tokens, rtol=1e-3, atol=1e-5)


def test_the_forward_direction_is_the_divergence_that_search_measures(case):
    @jax.jit
    def expected(student, teacher, tokens):
        x, y = models.hidden(teacher, tokens, case.teacher_cfg), models.hidden(student, tokens, case.cfg)
        return models.token_kl(teacher, x, student, y, case.cfg)

    np.testing.assert_allclose(divergence(case), expected(*case.pair, case.batch["tokens"][:, :-1]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 5])
def test_tokens_outside_the_top_are_one_outcome(case, k):
    p, q = map(log_softmax, logits(case))
    order = np.argsort(-p, -1)
    p, q = (np.take_along_axis(np.exp(z), order, -1) for z in (p, q))
    p, q = (np.concatenate([z[..., :k], z[..., k:].sum(-1, keepdims=True)], -1) for z in (p, q))
    top = divergence(case, top_k=k)
    np.testing.assert_allclose(top, (p * np.log(p / q)).sum(-1), rtol=1e-3, atol=1e-5)
    assert (top <= divergence(case) + 1e-5).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_the_top_of_all_tokens_is_the_whole(case, reverse):
    v, whole = case.cfg.vocab, divergence(case, reverse=reverse)
    for k in (v - 1, v):
        np.testing.assert_allclose(divergence(case, top_k=k, reverse=reverse), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [OPTIONS["forward"], OPTIONS["top"]], ids=["forward", "top"])
def test_chunks_change_neither_loss_nor_gradient(case, options):
    results = []
    for chunk in (5, 256):
        loss = recovery.distill_loss(case.cfg, case.teacher_cfg, alpha=None, chunk=chunk, ce_weight=0.5, **options)
        results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(case.pair.student, case.pair, case.batch))
    chex.assert_trees_all_close(*results, rtol=1e-3, atol=1e-5)


def shapes_in(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from shapes_in(inner)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_of_all_tokens_are_never_in_memory(case, options):
    cfg = dataclasses.replace(case.teacher_cfg, vocab=640)
    params = models.shapes(cfg)
    loss = recovery.distill_loss(cfg, cfg, alpha=None, chunk=4, ce_weight=1.0, **options)
    batch = {name: jax.ShapeDtypeStruct((4, 9), dtype) for name, dtype in dict(tokens=jnp.int32, weights=jnp.float32).items()}
    jaxpr = jax.make_jaxpr(jax.grad(loss, has_aux=True))(params, recovery.Pair(params, params), batch)
    sizes = [np.prod(shape) for shape in shapes_in(jaxpr.jaxpr) if 640 in shape and cfg.d not in shape]
    assert max(sizes) == 4 * 640


def test_gradients_at_high_temperature_are_differences_of_logits():
    """Hinton et al., 2015, equation 4, times T^2: whatever T, gradients have the same size."""
    v = 8
    cfg = models.LlamaConfig(vocab=v, d=v, head_dim=8, layers=(models.LayerDims(1, 1, 8),))
    head = dict(head=jnp.eye(v))
    z, w = jax.random.normal(jax.random.key(0), (2, 1, 3, v))
    centred = (z - z.mean(-1, keepdims=True)) - (w - w.mean(-1, keepdims=True))
    for temperature in (100.0, 400.0):

        def total(z, temperature=temperature):
            return recovery.logit_divergence(head, z, cfg, head, w, cfg, temperature=temperature).sum()

        np.testing.assert_allclose(jax.grad(total)(z), centred / v, atol=0.02 * jnp.abs(centred).max() / v)


def test_hidden_states_are_compared_where_the_map_says(case):
    tokens, weights = case.batch["tokens"][:, :-1], np.asarray(case.batch["weights"])[:, 1:]
    own = np.asarray(models.residuals(case.pair.student, tokens, case.cfg), np.float64)
    other = np.asarray(models.residuals(case.pair.teacher, tokens, case.teacher_cfg), np.float64)

    def total(**options):
        return value(recovery.distill_loss(case.cfg, case.teacher_cfg, alpha=None, **options), case)

    def expected(pairs):
        distance = [((own[s + 1] - other[t + 1]) ** 2).sum(-1) / (other[t + 1] ** 2).sum(-1) for s, t in pairs]
        return (weights * np.mean(distance, 0)).sum() / weights.sum()

    for layer_map in (((1, 0), (2, 2)), None):
        got = total(hidden_weight=10.0, layer_map=layer_map) - total()
        np.testing.assert_allclose(got, 10 * expected(layer_map or ((0, 0), (1, 1), (2, 2))), rtol=1e-3)


def test_the_texts_tokens_can_be_mixed_in(case):
    pure, mixed = (recovery.distill_loss(case.cfg, case.teacher_cfg, alpha=None, ce_weight=w) for w in (0.0, 0.25))
    nll = jax.jit(recovery.lm_loss(case.cfg, alpha=None))(case.pair.student, case.pair.student, case.batch)[0]
    np.testing.assert_allclose(value(mixed, case) - value(pure, case), 0.25 * nll, rtol=1e-3)


def test_residuals_are_what_flows_between_layers(case):
    layers = (case.cfg.layers[0], models.LayerDims(0, 0, 0), *case.cfg.layers[1:])
    cfg = dataclasses.replace(case.cfg, layers=layers)
    params = models.init(jax.random.key(2), cfg)
    states = models.residuals(params, case.batch["tokens"], cfg)
    seen = models.observe(params, case.batch["tokens"], lambda s: {a: (s[a].before, s[a].after) for a in s}, cfg)
    for i in (0, 2, 3):
        chex.assert_trees_all_close((seen[i]["k"][0], seen[i]["f"][1]), (states[i], states[i + 1]), rtol=1e-6)
    chex.assert_trees_all_equal(states[1], states[2])


def test_a_block_learns_from_the_teachers_input_alone(case):
    loss = recovery.block_loss(case.cfg, case.teacher_cfg, alpha=None)
    grad = jax.jit(jax.grad(loss, has_aux=True))
    before, _ = grad(case.pair.student, case.pair, case.batch)
    student = dict(case.pair.student, run_0=jax.tree.map(lambda x: 1.5 * x, case.pair.student["run_0"]))
    after, _ = grad(student, case.pair, case.batch)
    last = f"run_{len(case.cfg.runs) - 1}"
    assert optax.tree.norm(before[last]) == 0, "the last layer is whole: it does what the teacher's does"
    chex.assert_trees_all_equal(
        {k: v for k, v in before.items() if k != "run_0"}, {k: v for k, v in after.items() if k != "run_0"}
    )
    assert optax.tree.norm(jax.tree.map(jnp.subtract, before["run_0"], after["run_0"])) > 1e-3
    assert not any(after[name].any() for name in ("embed", "norm", "head"))


def test_a_block_does_the_work_of_those_before_it_that_went(case):
    plan = Plan(({}, {"k": [], "f": []}, {}), models.unit_counts(case.teacher_cfg))
    student, cfg = surgery.cut(case.pair.teacher, case.teacher_cfg, plan)
    tokens, weights = case.batch["tokens"][:, :-1], np.asarray(case.batch["weights"])[:, 1:]
    states = models.residuals(case.pair.teacher, tokens, case.teacher_cfg)
    arrays = jax.tree.map(lambda x: x[0], student["run_2"])
    out = models.sublayer(arrays, "down", models.sublayer(arrays, "o", states[1], cfg), cfg)
    error = ((out - states[3]) ** 2).sum(-1) / ((states[3] - states[1]) ** 2).sum(-1)
    loss = recovery.block_loss(cfg, case.teacher_cfg, alpha=None)
    got, _ = jax.jit(loss)(student, recovery.Pair(student, case.pair.teacher), case.batch)
    np.testing.assert_allclose(got, (weights * error / 2).sum() / weights.sum(), rtol=1e-4)  # the first layer has no error


@pytest.mark.parametrize(("alpha", "dtype"), [(8, jnp.float32), (None, jnp.bfloat16)], ids=["lora", "full"])
def test_training_comes_nearer_to_the_teacher(case, alpha, dtype):
    pair = jax.tree.map(lambda x: x.astype(dtype), case.pair)
    adapter = jax.tree.map(lambda x: x.astype(jnp.float32), pair.student)
    if alpha is not None:
        adapter = recovery.lora.init(jax.random.key(1), pair.student, case.cfg, rank=4)
    loss = recovery.distill_loss(case.cfg, case.teacher_cfg, alpha=alpha)
    _, tx = recovery.schedule_and_optimizer(1e-2, 40, warmup=4)
    trained, losses = recovery.fit(loss, pair, adapter, lambda step: case.batch, tx, steps=40)
    assert losses[-3:].mean() < 0.7 * losses[0]
    assert {x.dtype for x in jax.tree.leaves((trained, tx.init(adapter))) if x.ndim} == {jnp.dtype("float32")}
    assert recovery.assemble(pair.student, trained, alpha)["run_0"]["q"].dtype == dtype


@pytest.mark.parametrize("alpha", [8], ids=["lora"])
def test_an_interrupted_run_goes_on_to_the_same_losses(case, tmp_path, alpha):
    adapter = case.pair.student if alpha is None else recovery.lora.init(jax.random.key(1), case.pair.student, case.cfg, rank=4)
    loss = recovery.distill_loss(case.cfg, case.teacher_cfg, alpha=alpha, hidden_weight=1.0, top_k=9)
    _, tx = recovery.schedule_and_optimizer(1e-2, 6, warmup=1)

    def stop(step, _):
        if step == 3:
            raise KeyboardInterrupt

    whole = recovery.fit(loss, case.pair, adapter, batches, tx, steps=6)
    options = dict(steps=6, checkpoint_dir=tmp_path, save_every=2, resume=True)
    with pytest.raises(KeyboardInterrupt):
        recovery.fit(loss, case.pair, adapter, batches, tx, callback=stop, **options)
    again = recovery.fit(loss, case.pair, adapter, batches, tx, **options)
    chex.assert_trees_all_equal(again, whole)


@pytest.mark.parametrize("kind", ["logits", "blockwise"])
def test_a_mesh_of_eight_devices_gives_the_losses_of_one(case, kind):
    """By SGD: Adam's first updates are signs, which rounding can turn."""
    loss = recovery.distill_loss(case.cfg, case.teacher_cfg, alpha=None, hidden_weight=1.0, top_k=20)
    if kind == "blockwise":
        loss = recovery.block_loss(case.cfg, case.teacher_cfg, alpha=None)
    tx = optax.sgd(0.01)
    whole, losses = recovery.fit(loss, case.pair, case.pair.student, batches, tx, steps=2)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))
    pair = jax.device_put(case.pair, everywhere)
    spread, same = recovery.fit(loss, pair, pair.student, lambda s: jax.device_put(batches(s), rows), tx, steps=2)
    np.testing.assert_allclose(same, losses, rtol=1e-4)
    change = optax.tree.norm(jax.tree.map(jnp.subtract, whole, case.pair.student))
    error = optax.tree.norm(jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), spread, whole))
    assert error < 1e-3 * change
    assert spread["run_0"]["q"].sharding.is_equivalent_to(everywhere, 4)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(alpha=0), "alpha: 0 given"),
        (dict(temperature=0.0), "temperature: 0.0 given; it must be a positive number"),
        (dict(temperature=float("nan")), "temperature: nan given"),
        (dict(top_k=0), "top_k: 0 given; it must be at least 1"),
        (dict(ce_weight=-1.0), "ce_weight: -1.0 given; it must be a number from 0 upwards"),
        (dict(hidden_weight=float("inf")), "hidden_weight: inf given"),
        (dict(layer_map=((0, 0),)), "layer_map: given without a hidden_weight"),
        (
            dict(hidden_weight=1.0, layer_map=((0, 3),)),
            r"layer_map: 0:3 given; the student has layers \[0, 1, 2\], the teacher 0 to 2",
        ),
        (dict(hidden_weight=1.0, layer_map=()), "layer_map: no pair given"),
    ],
)
def test_bad_options_are_refused(case, options, message):
    with pytest.raises(ValueError, match=message):
        recovery.distill_loss(case.cfg, case.teacher_cfg, **dict(alpha=None) | options)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(vocab=65), "teacher: its vocabulary has 65 tokens, the student's 64"),
        (dict(d=40), "its residual stream has 40 channels, the student's 32 channels, so hidden states cannot"),
        (dict(shortcuts=True), "has 32 channels, rotated, the student's 32 channels"),
        (dict(layers=(models.LayerDims(2, 2, 48),) * 5), "the student has 3 layers, the teacher 5; say which belong together"),
    ],
)
def test_teachers_of_another_shape_are_refused(case, change, message):
    with pytest.raises(ValueError, match=message):
        recovery.distill_loss(case.cfg, dataclasses.replace(case.teacher_cfg, **change), alpha=None, hidden_weight=1.0)


@pytest.mark.parametrize(
    "layer_map", [((0, 0), (1, 1)), ((0, 0), (1, 2), (2, 1)), ((0, 0), (2, 1), (1, 2)), ((0, 1), (1, 1), (2, 2))]
)
def test_blocks_need_a_map_that_rises(case, layer_map):
    with pytest.raises(ValueError, match=r"block by block, each of the student's layers \[0, 1, 2\] needs one"):
        recovery.block_loss(case.cfg, case.teacher_cfg, alpha=None, layer_map=layer_map)
