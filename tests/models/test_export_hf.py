"""Export profiles for transformers and MaxText: what they refuse and write, what padding computes, sizes of files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxprune import models
from jaxprune.models import LayerDims, LlamaConfig
from jaxprune.models.export import hf, hf_custom, hf_padded, maxtext

A, B, GONE = LayerDims(2, 2, 48), LayerDims(1, 3, 40), LayerDims(0, 0, 0)
NO_ATTENTION, NO_MLP = LayerDims(0, 0, 40), LayerDims(2, 1, 0)
ALL = ("q", "k", "v", "o", "gate", "up", "down")
GRID = (("columns", 4), ("first", 1), ("rope_type", "grid"))
LLAMA31 = tuple(sorted(dict(rope_type="llama3", **maxtext.LLAMA31).items()))


def config(*layers: LayerDims, **settings) -> LlamaConfig:
    return LlamaConfig(layers=layers, **dict(vocab=64, d=32, head_dim=8) | settings)


PADDABLE = dict(
    widths=config(A, B),
    parts_gone=config(B, NO_ATTENTION, GONE, NO_MLP, A),
    biases=config(B, NO_ATTENTION, GONE, NO_MLP, A, biases=ALL),
    tied_qwen2=config(A, B, NO_MLP, biases=("q", "k", "v"), family="qwen2", tie_embeddings=True),
    window=config(B, NO_ATTENTION, sliding_window=4),
    odd_heads=config(LayerDims(3, 1, 40), LayerDims(1, 1, 48), biases=("o", "down")),
    narrow=config(A, B, d=24),
    pairs=config(A._replace(pairs=(0, 2)), NO_ATTENTION, B._replace(pairs=(3,)), A, biases=("q", "k", "v")),
    bfloat16=config(A, B, NO_ATTENTION),
)


def random(cfg: LlamaConfig, dtype: str = "float32"):
    """Parameters without a zero, so that nothing is equal by chance."""
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda x: jnp.asarray(draw(0, 0.3, x.shape), dtype), models.shapes(cfg))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("name", PADDABLE)
def test_padding_changes_no_logits(tokens, name):
    cfg = PADDABLE[name]
    params = random(cfg, "bfloat16" if name == "bfloat16" else "float32")
    wide, wide_cfg = hf_padded.pad(params, cfg)
    assert hf.problems(cfg) and not hf.problems(wide_cfg)
    assert {dims for dims in wide_cfg.layers if wide_cfg.layer_arrays(dims)} == {wide_cfg.layers[0]}
    assert jax.tree.map(jnp.shape, wide) == jax.tree.map(jnp.shape, models.shapes(wide_cfg))
    ours = models.apply(params, jnp.asarray(tokens), cfg)
    tolerance = (3e-2 if name == "bfloat16" else 1e-5) * float(jnp.abs(ours).max())
    np.testing.assert_allclose(models.apply(wide, jnp.asarray(tokens), wide_cfg), ours, atol=tolerance)


def test_padding_to_the_shape_of_the_dense_model_gives_back_its_zeroed_groups(tmp_path):
    """What pruning took is zero, what it kept is where it comes first."""
    dense, cfg = LayerDims(4, 3, 64), config(A, B, GONE)
    params = random(cfg)
    wide, wide_cfg = hf_padded.pad(params, cfg, dense)
    assert wide_cfg.layers == (dense, dense, GONE)
    q = np.asarray(wide["run_0"]["q"])  # ldkgh
    np.testing.assert_array_equal(q[0][:, :2, :2], params["run_0"]["q"][0])
    np.testing.assert_array_equal(q[1][:, :1, :3], params["run_1"]["q"][0])
    assert not q[0][:, 2:].any() and not q[0][:, :, 2:].any() and not q[1][:, 1:].any()
    hf_padded.write(tmp_path, params, cfg, dims=dense)
    loaded, read = models.load(tmp_path)
    assert_equal(loaded, wide)
    assert read.layers == wide_cfg.layers


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        (config(A, B), "2 different shapes.*layer 0: 2 KV heads x 2 query heads, 48 channels; layer 1.*2 KV heads x 3 query"),
        (config(A, B, biases=("o",)), "2 KV heads x 4 query heads, 48 channels: export as hf-padded, or prune with --for hf"),
        (config(*[NO_ATTENTION] * 2), "all layers have no attention, 40 channels.*1 KV head x 1 query head, 40 channels"),
        (config(*[LayerDims(3, 1, 40)] * 2, biases=("o",)), "3 heads do not divide the hidden size 32.*4 KV heads x 1 query"),
        (config(A, A, d=24, shortcuts=True), "shortcut matrices.*export as hf-custom"),
        (config(A, A, d=24, norm_width=32), "divides by 32 instead of the width 24.*hf-custom"),
        (config(A, A, sliding_window=4, biases=("o",)), "sliding_window 4 and biases of o"),
        (config(A, A, rope_scaling=GRID), "'grid' is unknown"),
        (config(*[A._replace(pairs=(0, 3))] * 2), "query heads of 2 rotary pairs, 48 channels.*export as hf-padded"),
    ],
)
def test_plain_profile_says_what_is_in_the_way(tmp_path, cfg, said):
    with pytest.raises(ValueError, match=said):
        hf.write(tmp_path / "out", random(cfg), cfg)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("cfg", "dims", "said"),
    [
        (config(A, B, shortcuts=True), None, "shortcut matrices"),
        (config(A, B, d=24, norm_width=32), None, "divides by 32"),
        (config(A, B, sliding_window=4, biases=("o",)), None, "a window"),
        (config(GONE, GONE), None, "nothing is left"),
        (config(LayerDims(5, 7, 40), A, biases=("o",)), None, "no number of heads that holds 5 x 7"),
        (
            config(A, B),
            LayerDims(2, 2, 48),
            "layer 1 has 1 KV head x 3 query heads.*give at least 2 KV heads x 3 query heads, 48",
        ),
        (config(A, B, biases=("o",)), LayerDims(3, 3, 48), "no class of transformers has such layers"),
        (config(NO_ATTENTION), LayerDims(0, 0, 48), "no class of transformers has such layers"),
    ],
)
def test_padding_says_what_it_cannot_do(tmp_path, cfg, dims, said):
    for call in (
        lambda: hf_padded.pad(random(cfg), cfg, dims),
        lambda: hf_padded.write(tmp_path / "out", random(cfg), cfg, dims=dims),
        lambda: hf_padded.predicted_bytes(cfg, "float32", dims),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    assert not (tmp_path / "out").exists()


def test_custom_profile_refuses_what_transformers_has_no_rotations_for(tmp_path):
    cfg = config(A, B, rope_scaling=GRID)
    with pytest.raises(ValueError, match="export as hf-custom: rope scaling 'grid'"):
        hf_custom.write(tmp_path / "out", random(cfg), cfg)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("profile", "cfg"),
    [
        (hf, config(A, A, GONE, tie_embeddings=True)),
        (hf, config(A, A, biases=("o", "down"))),  # the file also has zeros for q k v gate up
        *((hf_padded, PADDABLE[name]) for name in ("parts_gone", "biases", "odd_heads")),
        *((hf_custom, PADDABLE[name]) for name in ("parts_gone", "biases")),
        (hf_custom, config(A, B, d=24, shortcuts=True, norm_width=32)),
    ],
)
def test_predicted_bytes_are_those_in_the_file(tmp_path, profile, cfg, dtype):
    profile.write(tmp_path, random(cfg, dtype), cfg)
    held = sum(x.nbytes for x in load_file(tmp_path / "model.safetensors").values())
    assert profile.predicted_bytes(cfg, dtype) == held


def test_code_beside_the_weights_names_the_classes_that_the_configuration_does(tmp_path):
    hf_custom.write(tmp_path, random(config(A, B)), config(A, B))
    written = json.loads((tmp_path / "config.json").read_text())
    code = (tmp_path / "modeling_jaxprune.py").read_text()
    for place in written["auto_map"].values():
        module, name = place.split(".")
        assert (tmp_path / f"{module}.py").is_file()
        assert f"\nclass {name}(" in code


STACKED = dict(
    plain=config(A, A, A),
    layers_gone=config(A, GONE, A),
    tied=config(A, A, tie_embeddings=True, d=24),
    llama31=config(*[LayerDims(1, 3, 40)] * 2, rope_scaling=LLAMA31, rope_theta=500000.0),
)


def maxtext_logits(tree: dict, tokens: np.ndarray, cfg: LlamaConfig) -> jax.Array:
    """The model of the checkpoint, written down from MaxText's layers: unscaled attention, one of two rotary layouts."""

    def norm(x, scale):
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + cfg.norm_eps) * scale

    def rotate(x):  # b t n h
        from jaxprune.models import _rope

        cos, sin = (y[None, :, None] for y in _rope.tables(cfg, jnp.arange(x.shape[1]), x.shape[1]))
        if not cfg.rope_scaling:
            a, b = jnp.split(x, 2, -1)
            return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
        a, b = x[..., ::2], x[..., 1::2]
        return jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)

    layers = tree["decoder"]["layers"]
    x = jnp.asarray(tree["token_embedder"]["embedding"])[tokens]
    seen = np.tril(np.ones((tokens.shape[1],) * 2, bool))
    for i in range(layers["mlp"]["wi_0"]["kernel"].shape[1]):
        p = jax.tree.map(lambda w, i=i: jnp.asarray(w)[:, i], layers)
        y, attention = norm(x, p["pre_self_attention_layer_norm"]["scale"]), p["self_attention"]
        q, k, v = (jnp.einsum("btd,dnh->btnh", y, attention[name]["kernel"]) for name in ("query", "key", "value"))
        k, v = (jnp.repeat(z, q.shape[2] // z.shape[2], 2) for z in (rotate(k), v))
        scores = jnp.where(seen, jnp.einsum("btnh,bsnh->bnts", rotate(q), k), -jnp.inf)
        z = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)
        x = x + jnp.einsum("btnh,nhd->btd", z, attention["out"]["kernel"])
        y, mlp = norm(x, p["post_self_attention_layer_norm"]["scale"]), p["mlp"]
        x = x + (jax.nn.silu(y @ mlp["wi_0"]["kernel"]) * (y @ mlp["wi_1"]["kernel"])) @ mlp["wo"]["kernel"]
    head = tree["token_embedder"]["embedding"].T if cfg.tie_embeddings else tree["decoder"]["logits_dense"]["kernel"]
    return norm(x, tree["decoder"]["decoder_norm"]["scale"]) @ head


@pytest.mark.parametrize("name", STACKED)
def test_stacked_parameters_compute_the_same_model(tokens, name):
    cfg = STACKED[name]
    params = random(cfg)
    ours = models.apply(params, jnp.asarray(tokens), cfg)
    np.testing.assert_allclose(maxtext_logits(maxtext.tree(params, cfg), tokens, cfg), ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_orbax_reads_the_stacked_parameters(tmp_path, dtype):
    import orbax.checkpoint as ocp

    cfg = STACKED["layers_gone"]
    params = random(cfg, dtype)
    maxtext.write(tmp_path, params, cfg)
    wanted = {"params": {"params": maxtext.tree(params, cfg)}}
    with ocp.PyTreeCheckpointer() as checkpointer:
        like = jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        read = checkpointer.restore(tmp_path / "0" / "items", restore_args=like)
    assert_equal(read, wanted)
    assert maxtext.predicted_bytes(cfg, dtype) == sum(x.nbytes for x in jax.tree.leaves(read))
    settings = dict(line.split(": ", 1) for line in (tmp_path / "maxtext.yml").read_text().splitlines())
    assert (settings["base_num_decoder_layers"], settings["base_mlp_dim"], settings["logits_via_embedding"]) == (
        "2",
        "48",
        "false",
    )


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        (config(A, B), "2 different shapes.*pad them"),
        (config(NO_MLP, NO_MLP), "have an attention and an MLP; here layers 0, 1: 2 KV heads x 1 query head, no MLP"),
        (config(GONE), "nothing is left"),
        (config(A, biases=("o", "down")), "biases of o, down"),
        (config(A, shortcuts=True), "rotated"),
        (config(A, sliding_window=4), "sliding_window 4"),
        (config(A._replace(pairs=(0,))), "heads of layer 0 have lost rotary pairs; export as hf-padded"),
        (config(A, rope_scaling=(("factor", 2.0), ("rope_type", "linear"))), "factor=2.0, rope_type=linear.*Llama 3.1 only"),
    ],
)
def test_stacked_parameters_say_what_is_in_the_way(tmp_path, cfg, said):
    with pytest.raises(ValueError, match=f"export as maxtext: .*{said}"):
        maxtext.write(tmp_path / "out", random(cfg), cfg)
    assert not (tmp_path / "out").exists()


def test_a_padded_model_can_be_stacked(tokens):
    cfg = PADDABLE["parts_gone"]
    wide, wide_cfg = hf_padded.pad(random(cfg), cfg)
    ours = models.apply(random(cfg), jnp.asarray(tokens), cfg)
    np.testing.assert_allclose(maxtext_logits(maxtext.tree(wide, wide_cfg), tokens, wide_cfg), ours, atol=1e-4, rtol=1e-4)
