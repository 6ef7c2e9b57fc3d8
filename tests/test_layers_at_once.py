"""Some layers at a time: the same numbers as all at once, from probes and statistics of these layers alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import kronecker, models, pipeline, scorers
from jaxprune.models import LayerDims, LlamaConfig

A = LayerDims(2, 2, 48)
CFG = LlamaConfig(vocab=64, d=32, head_dim=8, layers=(A, A, A, LayerDims(0, 0, 0), LayerDims(1, 2, 40), LayerDims(0, 0, 40)))
PARAMS = jax.tree.map(lambda x: 3 * x, models.init(jax.random.key(0), CFG))
TOKENS = jax.random.randint(jax.random.key(1), (4, 10), 0, CFG.vocab)


@pytest.mark.parametrize("layers", [range(1), range(1, 2), range(1, 5), range(3, 4), range(2, 6)])
def test_what_is_observed_of_some_layers_is_that_of_all(layers):
    def reduce(sites):
        return {a: (s.z, s.before, s.after) for a, s in sites.items()}

    seen = models.observe(PARAMS, TOKENS, reduce, CFG, layers)
    chex.assert_trees_all_close(seen, models.observe(PARAMS, TOKENS, reduce, CFG)[layers.start : layers.stop], rtol=1e-5)


@pytest.mark.parametrize("kind", ["gates", "taps", "output"])
def test_probes_of_some_layers_get_the_gradients_of_all(kind):
    loss, layers = models.loss_fn(CFG), range(1, 5)

    def gradient(probes):
        return jax.grad(lambda p: loss(PARAMS, {kind: p}, TOKENS).sum())(probes[kind])

    whole, some = gradient(models.probes(CFG)), gradient(models.probes(CFG, layers=layers))
    assert not (some[0] or some[5])
    chex.assert_trees_all_close(some[1:5], whole[1:5], rtol=1e-4, atol=1e-6)


def test_weights_get_the_gradients_that_they_get_without_probes():
    """Layers of a run whose probes differ are taken from its arrays one by one."""
    loss = models.loss_fn(CFG)
    probes = {"gates": models.probes(CFG, layers=range(1, 2))["gates"]}
    some, whole = (jax.grad(lambda w, p=p: loss(w, p, TOKENS).sum())(PARAMS) for p in (probes, {}))
    chex.assert_trees_all_close(some, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("at_once", [1, 2, 4, 9])
def test_scores_and_plan_do_not_depend_on_how_many_are_scored_at_once(at_once):
    some, whole = (
        pipeline.prune(PARAMS, CFG, np.asarray(TOKENS), pipeline.Settings(ratio=0.3, layers_at_once=n, multiple_of=4))
        for n in (at_once, None)
    )
    chex.assert_trees_all_close(some.scores, whole.scores, rtol=1e-3)
    assert some.plan.digest == whole.plan.digest


def test_state_and_temporaries_are_those_of_few_layers():
    cfg = LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 256),) * 24)
    params, probes = models.shapes(cfg), models.probes(cfg)
    scorer = kronecker.kronecker_obs(cfg, jax.random.key(0))

    def bytes_of(some):
        state = jax.eval_shape(scorer.init, some)
        compiled = jax.jit(scorer.update, donate_argnums=0).lower(state, params, some, TOKENS).compile()
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)), compiled.memory_analysis().temp_size_in_bytes

    (few, little), (all_, much) = bytes_of(models.probes(cfg, layers=range(2, 4))), bytes_of(probes)
    assert few < all_ / 10 and little < much / 4
    weights = sum(x.size * 4 for x in jax.tree.leaves(params["run_0"]))
    assert little < weights / 2  # nothing copies the layers that are not asked for


def test_methods_of_few_numbers_refuse():
    with pytest.raises(
        ValueError, match="layers_at_once: 2 given; taylor keeps few numbers of a layer, leave it out; it is for kfac"
    ):
        pipeline.Settings(method="taylor", layers_at_once=2)
    with pytest.raises(ValueError, match="layers_at_once: 0 given; ask for at least 1"):
        pipeline.Settings(layers_at_once=0)


def test_a_scorer_of_the_first_layers_stops_behind_them():
    """The rest of the model is not even traced."""
    broken = PARAMS | {"run_2": {"q": jnp.zeros(3)}}
    scorer = kronecker.kronecker_obs(CFG, jax.random.key(0), fisher=False)
    found = scorers.score(scorer, broken, models.probes(CFG, layers=range(2)), [TOKENS])
    assert [len(layer) for layer in found] == [2, 2, 0, 0, 0, 0]
