"""Models whose layers are of two kinds: one run, and everywhere the same as layers of one kind, one after the other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import _block_latency, budgets, models, recovery, scorers, sequential, sparsify
from jaxprune.models import LayerDims, LlamaConfig, _attention, _kernels
from jaxprune.recovery import distill, sparse

LAYERS = (LayerDims(2, 2, 48),) * 3 + (LayerDims(1, 2, 40), LayerDims(0, 0, 40))
KINDS = dict(sliding_window=4, windowed=(True, False, True, False, True), local_rope_theta=50.0)
CFG = LlamaConfig(vocab=64, d=32, head_dim=8, layers=LAYERS, score_cap=2.0, score_width=5, **KINDS)
PARAMS = jax.tree.map(lambda x: x if (x == 1).all() else 8 * x, models.init(jax.random.key(0), CFG))
TOKENS = jax.random.randint(jax.random.key(1), (4, 16), 0, CFG.vocab)
WHERE = [(run, i) for run in CFG.runs for i in range(run.length)]


def alone(layer):
    """A model of one kind, that of the layer."""
    one = dataclasses.replace(CFG, windowed=(), local_rope_theta=None)
    held = CFG.windowed[layer]
    return dataclasses.replace(
        one, sliding_window=4 if held else None, rope_theta=CFG.local_rope_theta if held else CFG.rope_theta
    )


def after(params, x, layer, names=("o", "down")):
    """The stream after the sublayers of a layer, its arrays without its kind."""
    run, i = WHERE[layer]
    p = {n: a[i] for n, a in params[run.name].items()}
    for name in names:
        x = models.sublayer(p, name, x, alone(layer))
    return x, p


def scans(cfg):
    program = jax.make_jaxpr(functools.partial(models.hidden, cfg=cfg))(models.shapes(cfg), TOKENS)
    return sum(equation.primitive.name == "scan" for equation in program.eqns)


def test_layers_whose_kinds_alternate_are_one_run_and_one_scan():
    cfg = dataclasses.replace(CFG, layers=LAYERS[:1] * 26, windowed=(True, False) * 13)
    assert len(cfg.runs) == scans(cfg) == 1
    assert scans(CFG) == 3  # widths differ


def test_every_layer_is_computed_as_one_of_its_kind():
    states = models.residuals(PARAMS, TOKENS, CFG)
    for layer in range(len(LAYERS)):
        np.testing.assert_allclose(states[layer + 1], after(PARAMS, states[layer], layer)[0], atol=1e-5, rtol=1e-5)
    last = models.stream_norm(states[-1], PARAMS["norm"], CFG)
    np.testing.assert_allclose(models.hidden(PARAMS, TOKENS, CFG), last, atol=1e-5)
    for changed in (dict(windowed=(True,) * 5), dict(windowed=(False,) * 5), dict(local_rope_theta=None)):
        assert abs(models.hidden(PARAMS, TOKENS, dataclasses.replace(CFG, **changed)) - last).max() > 1e-2


def test_scores_and_losses_layer_by_layer_are_those_of_the_whole_model():
    def make(cfg):
        return scorers.wanda(functools.partial(models.observe, cfg=cfg))

    widths = tuple({a: n for a, n in layer.items()} for layer in models.unit_counts(CFG))
    dense = scorers.score(make(CFG), PARAMS, models.probes(CFG), [TOKENS])
    found = sequential.score(make, PARAMS, CFG, [TOKENS], widths)
    for layer, wanted in zip(found, dense, strict=True):
        for axis in wanted:
            np.testing.assert_allclose(layer[axis], wanted[axis], rtol=1e-4)
    pair = distill.Pair(PARAMS, PARAMS)
    batch = dict(tokens=TOKENS, weights=jnp.ones(TOKENS.shape))
    assert float(distill.block_loss(CFG, CFG, alpha=None)(PARAMS, pair, batch)[0]) < 1e-9


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_reconstruction_reads_what_the_layer_reads(layer):
    """The bias of a pruned attention is the mean of what went."""
    keep = tuple({"k": []} if i == layer else {} for i in range(len(LAYERS)))
    fitted, cfg = recovery.reconstruct(PARAMS, CFG, keep, [TOKENS], target="bias")
    sites = models.observe(PARAMS, TOKENS, lambda sites: {a: s.z.mean((0, 1)) for a, s in sites.items()}, CFG)
    run, i = WHERE[layer]
    wanted = jnp.einsum("kgh,kghd->d", sites[layer]["k"], PARAMS[run.name]["o"][i])
    np.testing.assert_allclose(fitted[run.name]["o_bias"][i], wanted, atol=1e-5)
    assert cfg.windowed == CFG.windowed


def test_sparsity_fits_on_what_the_layers_before_pass_on():
    asked = sparsify.Sparsity(method="wanda")
    new, _ = sparsify.sparsify(PARAMS, CFG, [np.asarray(TOKENS)], asked)
    x = new["embed"][TOKENS]
    for layer in range(len(LAYERS)):
        (run, i), name = WHERE[layer], "o" if LAYERS[layer].kv_heads else "down"
        x, p = after(new, x, layer, ()) if name == "o" else after(new, x, layer, ("o",))
        z = models.reads(p, name, x, alone(layer)).reshape(TOKENS.size, -1)
        w = np.asarray(PARAMS[run.name][name][i]).reshape(z.shape[1], -1).T
        keep = sparse.wanda(w, np.asarray(z.T @ z), asked.pattern)
        assert (np.asarray(p[name]).reshape(z.shape[1], -1).T == np.where(keep, w, 0)).mean() > 0.99  # ties apart
        x = after(new, x, layer, ("o", "down") if name == "o" else ("down",))[0]


@pytest.mark.parametrize("windowed", [True, False])
@pytest.mark.parametrize("t", [4, 5, 70])
def test_a_kind_that_is_an_array_is_the_kind_that_is_known(windowed, t):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, t, 2, *rest, 8)) for key, rest in zip(keys, [(3,), (), ()], strict=True))
    wanted = _attention.attend(q, k, v, 0.3, 0, 4 if windowed else None, None)
    found = jax.jit(lambda held: _attention.attend(q, k, v, 0.3, 0, 4, None, held))(jnp.array(windowed))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    with models.computing(attention="xla"):
        found = jax.jit(lambda held: _attention.attend(q, k, v, 0.3, 0, 4, None, held))(jnp.array(windowed))
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        with pytest.raises(ValueError, match="xla given, which cannot cap attention scores .*use blocks"):
            _attention.attend(q, k, v, 0.3, 0, 4, None, None, 2.0)
    capped = _attention.attend(q, k, v, 0.3, 0, 4, None, None, 2.0)
    np.testing.assert_allclose(_kernels.splash(q, k, v, 0.3, 4, 2.0, interpret=True), capped, atol=1e-5)


def test_gradients_of_all_ways_are_equal():
    cfg = dataclasses.replace(CFG, score_cap=None)
    gradient = jax.jit(jax.grad(lambda p: models.loss_fn(cfg)(p, {}, TOKENS).sum()))
    expected = gradient(PARAMS)
    with models.computing(attention="xla"):
        found = gradient(PARAMS)
    for path, x in jax.tree_util.tree_flatten_with_path(expected)[0]:
        y = functools.reduce(lambda tree, key: tree[key.key], path, found)
        np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-5 * float(abs(x).max()), err_msg=str(path))


def test_operations_are_counted_by_the_kind_of_the_layer():
    cfg = dataclasses.replace(CFG, layers=LAYERS[:1] * 4, windowed=(True, False) * 2)
    cost = budgets.flops(1e4, context=10).cost
    near, far = (cost(dataclasses.replace(cfg, windowed=(held,) * 4)) for held in (True, False))
    assert cost(cfg) == (near + far) / 2 and near < far
    stack = _block_latency._like(cfg, LAYERS[:1] * 7)
    assert stack.windowed == (True, False, True, False, True, False, True)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(windowed=(True,)), "windowed: 1 given for 5 layers"),
        (dict(sliding_window=None), "windowed: layers with a window given without sliding_window"),
        (dict(windowed=()), "local_rope_theta: given without windowed"),
        (dict(score_cap=0.0), "score_cap: 0.0 given"),
        (dict(activation="relu"), "activation: 'relu' given; allowed are silu, gelu_pytorch_tanh"),
    ],
)
def test_bad_configurations(changes, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(CFG, **changes)
