"""Law 11 on meshes: what is scored, cut, fitted, trained and measured on several devices equals what one device makes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune import _beside, evaluate, methods, models, pipeline, recovery, scorers, sharding
from jaxprune.models import LayerDims, LlamaConfig, _layout, _safetensors

CFG = LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(4, 2, 48),) * 2 + (LayerDims(1, 2, 40),))
PARAMS = jax.tree.map(lambda x: 3 * x, models.init(jax.random.key(0), CFG))
TOKENS = np.asarray(jax.random.randint(jax.random.key(1), (8, 17), 0, CFG.vocab))
MESHES = ["data=1", "data=2", "fsdp=2,tensor=2", "data=2,fsdp=2,tensor=2"]
METHODS = ["fisher", "kfac-obs", "flap", "numerical", "shortgpt"]
SETTINGS = pipeline.Settings(method="taylor", ratio=0.3, reconstruct="residual", ranking="global")


def close(a, b, rtol=1e-5):
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * max(1e-2, np.abs(y).max())), a, b)


def on(mesh):
    put = sharding.place(CFG, mesh)
    return jax.tree_util.tree_map_with_path(lambda path, x: put(tuple(k.key for k in path), np.asarray(x)), PARAMS)


def scored(method, params):
    options = methods.Options(microbatch=4)
    batches = [_beside.spread(params, TOKENS)]
    return scorers.score(methods.find(method).scorer(CFG, options), params, models.probes(CFG), batches)


@functools.cache
def alone(method):
    return scored(method, PARAMS)


@pytest.mark.parametrize(("text", "method"), [(text, "taylor") for text in MESHES] + [(MESHES[-1], m) for m in METHODS])
def test_scores(text, method):
    mesh = sharding.mesh_of(text)
    with jax.set_mesh(mesh):
        close(scored(method, on(mesh)), alone(method))


def trained(params, cfg):
    """Losses of three updates, and the merged weights."""
    loss = recovery.lm_loss(cfg, alpha=16, chunk=32)
    adapter = recovery.lora.init(jax.random.key(2), params, cfg, rank=4)

    def batch(step):
        return _beside.spread(params, dict(tokens=np.roll(TOKENS, step, 0), weights=np.ones(TOKENS.shape, np.float32)))

    adapter, losses = recovery.fit(loss, params, adapter, batch, optax.sgd(0.3), steps=3, accumulate=2)
    return losses, recovery.lora.merge(params, adapter, alpha=16)


def flow(params):
    """Prunes with reconstruction, trains and measures."""
    pruned = pipeline.prune(params, CFG, TOKENS, SETTINGS)
    losses, merged = trained(pruned.params, pruned.cfg)
    return pruned, losses, merged, evaluate.perplexity(merged, pruned.cfg, TOKENS.reshape(-1), window=12)


def test_cut_reconstruction_training_and_perplexity():
    mesh = sharding.mesh_of(MESHES[-1])
    with jax.set_mesh(mesh):
        pruned, losses, merged, found = flow(on(mesh))
    want, want_losses, want_merged, want_found = flow(PARAMS)
    assert pruned.cfg == want.cfg and pruned.plan.digest == want.plan.digest
    assert len(set(pruned.cfg.layers)) > 1 and pruned.cfg.decoder_parameters < CFG.decoder_parameters
    close(pruned.params, want.params, rtol=1e-4)  # of systems of equations
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    close(merged, want_merged, rtol=1e-4)
    np.testing.assert_allclose(found["perplexity"], want_found["perplexity"], rtol=1e-5)
    for tree in (pruned.params, merged):
        jax.tree.map(lambda x, home: chex.assert_equal(x.sharding.is_equivalent_to(home, x.ndim), True),
                     tree, sharding.shardings(pruned.cfg, mesh))  # fmt: skip


@pytest.mark.parametrize("tie", [False, True])
def test_a_checkpoint_is_loaded_into_its_shards_and_saved_from_them(tmp_path, tie):
    cfg = LlamaConfig(vocab=64, d=32, head_dim=8, layers=CFG.layers, tie_embeddings=tie, biases=("q", "o"))
    params = models.init(jax.random.key(3), cfg)
    models.save(tmp_path / "a", params, cfg)
    mesh = sharding.mesh_of("data=2,fsdp=2,tensor=2")
    loaded, same = models.load(tmp_path / "a", place=sharding.place(cfg, mesh))
    assert same == cfg
    chex.assert_trees_all_equal(loaded, params)
    gate = loaded["run_0"]["gate"]
    assert gate.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert {s.data.shape for s in gate.addressable_shards} == {(2, 16, 24)}
    assert {s.data.shape for s in loaded["embed"].addressable_shards} == {(16, 32)}
    models.save(tmp_path / "b", loaded, cfg)
    chex.assert_trees_all_equal(models.load(tmp_path / "b")[0], params)


def test_a_process_reads_what_its_devices_hold_and_no_more(tmp_path):
    """The devices of the first of two processes that share all weights."""
    cfg = LlamaConfig(vocab=64, d=32, head_dim=8, layers=CFG.layers, biases=("q", "o"))
    params = models.init(jax.random.key(3), cfg)
    models.save(tmp_path, params, cfg)
    source, seen, held = _safetensors.open_folder(tmp_path), [], []

    def read(*words):
        for rows, values in source.read(*words):
            seen.append(values.nbytes)
            yield rows, values

    where = sharding.shardings(cfg, mesh := sharding.mesh_of("fsdp=4,tensor=2"))

    def place(path, x):
        full, home = (functools.reduce(lambda tree, key: tree[key], path, tree) for tree in (params, where))
        index = home.devices_indices_map(x.shape)
        for mine in {str(index[device]): index[device] for device in mesh.devices.flat[:4]}.values():
            held.append(full[mine].nbytes)
            np.testing.assert_array_equal(x[mine], full[mine])
        np.testing.assert_array_equal(np.asarray(x), full)
        return full

    _layout.assemble(source._replace(read=read), None, place)
    everything = sum(x.nbytes for x in jax.tree.leaves(params))
    assert sum(seen) == sum(held) + everything and sum(held) < 0.6 * everything


def test_each_device_has_its_sequences_and_no_more_work_than_its_share():
    mesh = sharding.mesh_of("data=2,fsdp=2")
    params = on(mesh)
    tokens = _beside.spread(params, TOKENS)
    assert {s.data.shape for s in tokens.addressable_shards} == {(2, 17)}
    assert _beside.spread(params, TOKENS[:2]).sharding.spec == PartitionSpec("data")
    assert _beside.spread(params, TOKENS[:3]).sharding.is_fully_replicated
    assert _beside.spread(PARAMS, TOKENS) is TOKENS
    loss = models.loss_fn(CFG, microbatch=4, chunk=32)

    def flops(params, tokens):
        return jax.jit(jax.grad(lambda p, x: loss(p, {}, x).sum())).lower(params, tokens).compile().cost_analysis()["flops"]

    with jax.set_mesh(mesh):
        spread = flops(params, tokens)
    assert spread < 0.3 * flops(PARAMS, TOKENS)


def test_what_does_not_divide_is_whole_on_every_device_and_said():
    sizes = sharding.sizes_of("fsdp=3,tensor=2")
    notes = sharding.replicated(CFG, sizes)
    assert [note.split(" do not")[0] for note in notes] == [
        "the model: 32 residual channels", "the embedding: 64 tokens", "layer 2: 1 KV groups",
    ]  # fmt: skip
    mesh = sharding.mesh_of("fsdp=3,tensor=2")
    where = sharding.shardings(CFG, mesh)
    assert where["run_1"]["k"].spec == PartitionSpec(None, None, None, None)
    assert where["run_1"]["up"].spec == PartitionSpec(None, None, "tensor")
    assert where["embed"].spec == PartitionSpec("tensor", None)
    with pytest.raises(ValueError, match="strict sharding: the model: 32 residual channels do not divide by fsdp=3"):
        sharding.place(CFG, mesh, strict=True)
    assert sharding.replicated(CFG, sharding.sizes_of("data=8")) == ()


@pytest.mark.parametrize("text", ["", "data", "data=0", "data=-1", "data=2,data=2", "model=2", "data=2;tensor=2", "data=two"])
def test_other_meshes_are_refused(text):
    with pytest.raises(ValueError, match="given; name data, fsdp, tensor once each, with a size"):
        sharding.mesh_of(text)


def test_too_many_devices_are_refused_with_a_way_to_simulate_them():
    with pytest.raises(ValueError, match="takes 16 devices; there are 8 .*device_count=16"):
        sharding.mesh_of("fsdp=16")


MAPPED = {
    "fisher": lambda **o: scorers.fisher(models.loss_fn(CFG, chunk=32, **o), **o),
    "taylor": lambda **o: scorers.taylor(models.loss_fn(CFG, chunk=32, **o), **o),
    "taylor-mix": lambda **o: scorers.taylor(models.loss_fn(CFG, chunk=32, **o), "param_mix", **o),
    "wanda": lambda **o: scorers.wanda(functools.partial(models.observe, cfg=CFG), **o),
}


@pytest.mark.parametrize("name", MAPPED)
def test_shard_map(name):
    """Two sequences on each of four devices, one at a time."""
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    scorer = scorers.mapped(MAPPED[name](axis_name="batch"), mesh, "batch")
    found = scorers.score(scorer, PARAMS, models.probes(CFG), [TOKENS])
    close(found, scorers.score(MAPPED[name](), PARAMS, models.probes(CFG), [TOKENS]))


@pytest.mark.parametrize("name", ["fisher", "taylor"])
def test_a_shard_map_that_sums_gradients_by_itself_is_refused(name):
    """There the gradient by a probe is summed over devices before it is squared: Fisher was wrong in silence."""
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    scorer, whole = MAPPED[name](axis_name="batch"), PartitionSpec()
    update = jax.shard_map(scorer.update, mesh=mesh, in_specs=(whole, whole, whole, PartitionSpec("batch")), out_specs=whole)
    probes = models.probes(CFG)
    with pytest.raises(ValueError, match="check_vma=True given.*use scorers.mapped"):
        jax.eval_shape(update, scorer.init(probes), PARAMS, probes, TOKENS)
    with pytest.raises(ValueError, match="'data' given; the mesh has batch"):
        scorers.mapped(scorer, mesh, "data")


def test_without_a_mesh_that_is_set_the_results_are_the_same():
    mesh = sharding.mesh_of("fsdp=2,tensor=2")
    params = on(mesh)
    tokens = jax.device_put(TOKENS, NamedSharding(mesh, PartitionSpec()))
    close(jax.jit(functools.partial(models.apply, cfg=CFG))(params, tokens), models.apply(PARAMS, jnp.asarray(TOKENS), CFG))
