"""Sizes of programs that never run: against counts by hand, and against arrays that are there."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import _hlo, models, sharding, sizing
from jaxprune.models import decode, losses

CFG = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 5 + (models.LayerDims(2, 2, 40),))


def test_loops_count_as_often_as_they_turn():
    def f(x, w):
        return jax.lax.scan(lambda x, w: (jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x), None), x, w)[0] @ w[0]

    x, w = jax.ShapeDtypeStruct((4, 8), "float32"), jax.ShapeDtypeStruct((5, 8, 8), "float32")
    assert _hlo.count(jax.jit(f).lower(x, w).compile().as_text()).flops == (5 * 3 + 1) * 2 * 4 * 8 * 8


@pytest.mark.parametrize(
    ("line", "kind", "received"),
    [
        ("all-gather(%p), replica_groups={{0,1},{2,3}}, dimensions={0}", "all-gather", 4 * 32 / 2),
        ("all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add", "all-reduce", 2 * 4 * 32 * 3 / 4),
        ("all-gather(%p), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}", "all-gather", 4 * 32 * 3 / 4),
        ("all-gather(%p), replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}, dimensions={0}", "all-gather", 4 * 32 * 3 / 4),
        ("reduce-scatter(%p), replica_groups={{0,1,2,3}}, to_apply=%add", "reduce-scatter", 4 * 32 * 3),
        ("collective-permute(%p), source_target_pairs={{0,1},{1,0}}", "collective-permute", 4 * 32),
    ],
)
def test_collectives(line, kind, received):
    text = f"HloModule m\n\nENTRY %main (p: f32[8]) -> f32[4,8] {{\n  ROOT %x = f32[4,8]{{1,0}} {line}\n}}\n"
    assert _hlo.count(text).collectives == {kind: received}


def test_a_mesh_shares_work_and_memory():
    def found(text, stage):
        return sizing.size(CFG, sharding.mesh_of(text), stage, batch=8, length=17, dtype=jnp.float32)

    one, spread = found("data=1", "forward"), found("data=2,fsdp=2,tensor=2", "forward")
    by_hand = 2 * 8 * 16 * (CFG.decoder_parameters + CFG.vocab * CFG.d)
    assert by_hand < one.work.flops < 1.3 * by_hand and not one.work.collectives  # the rest is attention
    np.testing.assert_allclose(spread.work.flops, one.work.flops / 8, rtol=0.01)
    assert one.weights == 4 * models.count_parameters(CFG) and one.weights <= one.arguments < 1.01 * one.weights
    assert one.weights / 4 <= spread.weights < one.weights / 3.5  # norms are on every device
    assert spread.work.collectives["all-gather"] > spread.weights / 2


def test_more_devices_do_not_gather_the_head_more_often():
    x = jax.ShapeDtypeStruct((8, 64, 4), "float32")
    with jax.set_mesh(sharding.mesh_of("fsdp=8")):
        spread = jax.eval_shape(lambda x: losses.chunks(x, 16), x)
    one = jax.eval_shape(lambda x: losses.chunks(x, 16), jax.ShapeDtypeStruct((1, *x.shape[1:]), "float32"))
    assert spread.shape[0] == one.shape[0] == 4  # one device has as many tokens as each of the eight


@pytest.mark.parametrize("stage", ["score", "reconstruct", "recover"])
def test_every_stage_is_compiled(stage):
    found = sizing.size(CFG, sharding.mesh_of("fsdp=2"), stage, batch=2, length=9)
    assert found.total > found.weights and found.work.flops > 0 and found.work.collectives["all-gather"] > 0
    assert (found.beside > 0) == (stage == "reconstruct")


def test_more_layers_of_one_shape_are_no_more_products():
    """Products before XLA optimises: loops over layers have one body, whatever their length."""

    def products(stage, layers):
        cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * layers)
        if stage == "decode":
            cache = jax.eval_shape(lambda: decode.init_cache(cfg, 1, 8))
            token = jax.ShapeDtypeStruct((1,), jnp.int32)
            return decode.step.lower(models.shapes(cfg), token, 0, cfg, cache).as_text().count("dot_general")
        mesh = sharding.mesh_of("data=1")
        return sizing.lower(cfg, mesh, stage, batch=2, length=9)[1].as_text().count("dot_general")

    for stage in (*sizing.STAGES, "decode"):
        assert products(stage, 2) == products(stage, 5) > 0, stage


def test_the_command(capsys, tmp_path):
    from jaxprune import cli

    def run(*words):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["size", *words])
        return stopped.value.code, *capsys.readouterr()

    file = tmp_path / "config.json"
    file.write_text(json.dumps(models.to_hf_config(CFG)))
    status, out, err = run(
        "--model-config", str(file), "--mesh", "tensor=3", "--stage", "forward", "--batch", "1", "--length", "9"
    )
    assert status == 0 and "v5e" in out and "note: layer 5: 40 MLP channels do not divide by tensor=3" in err
    assert run("--model-config", str(tmp_path), "--stage", "forward", "--batch", "1", "--length", "9")[0] == 0  # its folder
    (tmp_path / "empty").mkdir()
    for words, message in {
        ("--model-config", str(tmp_path / "empty")): "name a config.json, a folder or one of llama-7b",
        ("--model-config", "llama-9b"): "name a config.json, a folder or one of llama-7b",
        ("--model-config", str(file), "--mesh", "data=99"): "takes 99 devices; there are 8",
        ("--model-config", str(file), "--method", "slicegpt"): "has no scores",
        ("--model-config", str(file), "--length", "1"): "at least one sequence of 2 tokens",
    }.items():
        status, _, err = run(*words)
        assert status == 2 and message in err.splitlines()[-1]
