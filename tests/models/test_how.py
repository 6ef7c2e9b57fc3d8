"""Ways of computing layers: the library functions give what our own attention gives, and policies change no gradient."""

import re
from contextlib import nullcontext

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import models
from jaxprune.models import _attention, _kernels


def arrays(t, s=None, b=2):
    random = np.random.default_rng(0)
    q = random.normal(size=(b, t, 2, 3, 8)).astype(np.float32)
    return [jnp.asarray(x) for x in (q, *random.normal(size=(2, b, s or t, 2, 8)).astype(np.float32))]


@pytest.mark.parametrize("window", [None, 1, 5])
def test_xla_equals_ours(window):
    q, k, v = arrays(70, s=75)

    def attend(q):
        return _attention.attend(q, k, v, 0.3, 0, window, None)

    expected, program = attend(q), str(jax.make_jaxpr(attend)(q))
    with models.computing(attention="xla"):
        assert str(jax.make_jaxpr(lambda q: attend(q))(q)) != program
        np.testing.assert_allclose(attend(q), expected, atol=1e-5)


def test_a_model_computed_in_another_way_has_the_same_gradient(tiny):
    gradient = jax.jit(jax.value_and_grad(lambda p: models.loss_fn(tiny.cfg)(p, {}, tiny.tokens).sum()))
    expected = gradient(tiny.params)
    with models.computing(attention="xla", remat="dots_saveable"):
        chex.assert_trees_all_close(gradient(tiny.params), expected, atol=1e-5)
    assert gradient._cache_size() == 2  # the one was not taken for the other


def test_policies_keep_what_they_name(tiny):
    def kept(policy):
        with models.computing(remat=policy):
            loss = models.loss_fn(tiny.cfg)
            back = jax.eval_shape(lambda p: jax.vjp(lambda p: loss(p, {}, tiny.tokens).sum(), p)[1], tiny.params)
        return sum(x.size for x in jax.tree.leaves(back))

    policies = ("nothing_saveable", "dots_with_no_batch_dims_saveable", "dots_saveable", "everything_saveable")
    sizes = [kept(policy) for policy in policies]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("mesh", [None, "data=2,fsdp=2,tensor=2"])
def test_offloaded_inputs_of_layers_wait_on_the_host_and_change_no_gradient(tiny, mesh):
    from jaxprune import sharding

    def gradient(params):
        return jax.grad(lambda p: models.loss_fn(tiny.cfg)(p, {}, tiny.tokens).sum())(params)

    def stacked():
        """Where the scan over layers of the first run leaves their residual streams: on the device or on the host."""
        (b, t), n = tiny.tokens.shape, tiny.cfg.runs[0].length
        scans = [line for line in str(jax.make_jaxpr(gradient)(tiny.params)).split("\n") if "= scan[" in line]
        found = re.findall(rf"f32(<host>)?\[{n},{b},{t - 1},{tiny.cfg.d}\]", "".join(scans))
        return [where for where in ("", "<host>") if where in found]

    assert stacked() == [""]
    expected = jax.jit(gradient)(tiny.params)
    with models.computing(remat="offload"), jax.set_mesh(sharding.mesh_of(mesh)) if mesh else nullcontext():
        assert stacked() == ["<host>"]
        chex.assert_trees_all_close(jax.jit(gradient)(tiny.params), expected, atol=1e-5)


@pytest.mark.parametrize(("window", "mesh"), [(None, None), (5, "data=2,tensor=2"), (None, "tensor=4")])
def test_the_kernel_for_tpus_equals_ours(window, mesh):
    from jaxprune import sharding

    def both(f):
        return jax.jit(jax.value_and_grad(lambda x: (jnp.sin(jnp.arange(8.0)) * f(*x)).sum()))(arrays(20))

    def kernel(q, k, v):
        return _kernels.splash(q, k, v, 0.3, window, interpret=True)

    expected = both(lambda q, k, v: _attention.attend(q, k, v, 0.3, 0, window, None))
    if mesh is None:
        found = both(kernel)
    else:
        with jax.set_mesh(sharding.mesh_of(mesh)):  # 2 KV groups do not divide by tensor=4: each device has both
            found = both(kernel)
    chex.assert_trees_all_close(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        (dict(attention="flash"), "allowed are blocks, xla, cudnn, splash"),
        (dict(attention="cudnn"), "needs a GPU; here is a CPU: use blocks, xla"),
        (dict(attention="splash"), "needs a TPU; here is a CPU: use blocks, xla"),
        (dict(remat="save_only_these_names"), "allowed are nothing_saveable"),
    ],
)
def test_ways_that_cannot_be_are_refused(way, words):
    with pytest.raises(ValueError, match=words):
        models.computing(**way)


def test_cudnn_refuses_float32():
    with pytest.raises(ValueError, match="cudnn given for a model in float32"):
        _kernels.dot_product(*arrays(4), 0.3, None, "cudnn")
