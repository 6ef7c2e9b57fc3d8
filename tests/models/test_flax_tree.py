"""Trees of transformers 4's `FlaxLlamaForCausalLM`: exact both ways, for dense and pruned models."""

import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import models
from jaxprune.models import LayerDims, LlamaConfig

A, B, GONE = LayerDims(2, 2, 48), LayerDims(1, 3, 40), LayerDims(0, 0, 0)


def config(*layers, **settings):
    return LlamaConfig(vocab=64, d=32, head_dim=8, layers=layers, **settings)


MODELS = dict(
    dense=config(A, A),
    tied=config(A, A, tie_embeddings=True),
    biases=config(A, A, biases=("q", "k", "v", "o")),
    flap=config(A, A, biases=("o", "down")),
    widths=config(A, B, LayerDims(0, 0, 48), LayerDims(2, 2, 0)),
    layers_gone=config(A, GONE, A),
)


def random(cfg, dtype="float32"):
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda x: jnp.asarray(draw(size=x.shape), dtype), models.shapes(cfg))


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(tmp_path, name, dtype):
    cfg = MODELS[name]
    params = random(cfg, dtype)
    tree = models.to_flax(params, cfg)
    assert_same_bits(models.from_flax(tree, cfg), params)
    assert_same_bits(models.to_flax(models.from_flax(tree, cfg), cfg), tree)
    assert_same_bits(models.from_flax(flax.core.freeze(dict(params=tree)), cfg), params)
    models.save_flax_msgpack(tmp_path, params, cfg)
    again, read = models.load_flax_msgpack(tmp_path)
    assert_same_bits(again, params)
    assert read == cfg


def test_the_tree_that_the_flax_model_has():
    """Names and shapes as the modules of transformers 4 declare them."""
    dense = {k: dict(kernel=s) for k, s in dict(q_proj=(32, 32), k_proj=(32, 16), v_proj=(32, 16), o_proj=(32, 32)).items()}
    mlp = {k: dict(kernel=s) for k, s in dict(gate_proj=(32, 48), up_proj=(32, 48), down_proj=(48, 32)).items()}
    layer = dict(input_layernorm=dict(weight=(32,)), post_attention_layernorm=dict(weight=(32,)), self_attn=dense, mlp=mlp)
    wanted = dict(
        model=dict(embed_tokens=dict(embedding=(64, 32)), layers={"0": layer, "1": layer}, norm=dict(weight=(32,))),
        lm_head=dict(kernel=(32, 64)),
    )
    for name in ("dense", "tied"):
        tree = models.to_flax(random(MODELS[name]), MODELS[name])
        assert jax.tree.map(lambda x: x.shape, tree) == wanted


def test_kernels_compute_the_same_projections():
    """A Dense layer with the kernel gives heads in the order of Flax LLaMA's reshape to (heads, head_dim)."""
    cfg = MODELS["dense"]
    params = random(cfg)
    attention = models.to_flax(params, cfg)["model"]["layers"]["1"]["self_attn"]
    x = np.random.default_rng(1).normal(size=(2, 3, 32)).astype(np.float32)
    heads = (x @ attention["q_proj"]["kernel"]).reshape(2, 3, 4, 8)
    ours = jnp.einsum("btd,dkgh->btkgh", x, params["run_0"]["q"][1]).reshape(2, 3, 4, 8)
    np.testing.assert_allclose(heads, ours, rtol=1e-4, atol=1e-4)
    joined = heads.reshape(2, 3, 32) @ attention["o_proj"]["kernel"]
    ours = jnp.einsum("btkgh,kghd->btd", ours.reshape(2, 3, 2, 2, 8), params["run_0"]["o"][1])
    np.testing.assert_allclose(joined, ours, rtol=1e-4, atol=1e-3)


def test_equals_the_torch_model(oracle, saved, tokens, logits_of):
    """Torch weights, moved into the Flax tree as transformers 4 moved them, are the model that we compute."""
    model = oracle("llama")
    cfg = models.from_hf_config(json.loads((saved(model) / "config.json").read_text()))
    flat = {}
    for name, x in model.state_dict().items():
        path = name.split(".")
        if x.ndim == 2:
            path[-1] = "embedding" if "embed" in name else "kernel"
        flat[tuple(path)] = x.numpy() if x.ndim == 1 or "embed" in name else x.numpy().T
    params = models.from_flax(flax.traverse_util.unflatten_dict(flat), cfg)
    ours = models.apply(params, jnp.asarray(tokens), cfg)
    np.testing.assert_allclose(ours, logits_of(model, tokens), atol=1e-4, rtol=1e-4)


def test_shards_of_msgpack(tmp_path):
    cfg = MODELS["dense"]
    params = random(cfg)
    models.save_flax_msgpack(tmp_path, params, cfg)
    flat = flax.traverse_util.flatten_dict(models.to_flax(params, cfg), sep="/")
    places = {}
    for i, (name, x) in enumerate(flat.items()):
        part = flax.traverse_util.unflatten_dict({name: np.ascontiguousarray(x)}, sep="/")
        (tmp_path / f"part{i}.msgpack").write_bytes(flax.serialization.to_bytes(part))
        places[name] = f"part{i}.msgpack"
    (tmp_path / "flax_model.msgpack").unlink()
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps(dict(weight_map=places)))
    assert_same_bits(models.load_flax_msgpack(tmp_path)[0], params)


def test_bad_trees():
    cfg = MODELS["dense"]
    params = random(cfg)

    def refused(match, cfg=cfg, **changes):
        flat = flax.traverse_util.flatten_dict(models.to_flax(params, MODELS["dense"]), sep="/") | changes
        flat = {k: v for k, v in flat.items() if v is not None}
        with pytest.raises(ValueError, match=match):
            models.from_flax(flax.traverse_util.unflatten_dict(flat, sep="/"), cfg)

    refused("model/norm/weight is missing", **{"model/norm/weight": None})
    refused(r"model/norm/weight has shape \(3,\)", **{"model/norm/weight": np.ones(3, np.float32)})
    refused("model/norm/weight holds NaN", **{"model/norm/weight": np.full(32, np.nan, np.float32)})
    refused("model/extra/weight has no place", **{"model/extra/weight": np.ones(3, np.float32)})
    refused("lm_head differs from the embedding; set tie_embeddings=False", MODELS["tied"])
    zero, one = np.zeros(32, np.float32), np.ones(32, np.float32)
    biases = {f"model/layers/{i}/self_attn/{n}_proj/bias": zero for i in "01" for n in "qo"}
    biases |= {f"model/layers/{i}/self_attn/{n}_proj/bias": zero[:16] for i in "01" for n in "kv"}
    only_o = config(A, A, biases=("o",))
    wrong = biases | {"model/layers/1/self_attn/q_proj/bias": one}
    refused("model/layers/1/self_attn/q_proj/bias is not zero", only_o, **wrong)


def test_bad_msgpack(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        models.load_flax_msgpack(tmp_path)
    cfg = MODELS["dense"]
    models.save_flax_msgpack(tmp_path, random(cfg), cfg)
    file = tmp_path / "flax_model.msgpack"
    data = file.read_bytes()
    for n in (0, 1, 1000, len(data) - 1):
        file.write_bytes(data[:n])
        with pytest.raises(ValueError, match="not a complete msgpack file"):
            models.load_flax_msgpack(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no flax_model.msgpack"):
        models.load_flax_msgpack(tmp_path)


def test_a_family_that_flax_does_not_have_is_refused(tmp_path):
    cfg = config(A, A, qk_norm=True, family="qwen3")
    for write in (models.to_flax, lambda params, cfg: models.save_flax_msgpack(tmp_path / "new", params, cfg)):
        with pytest.raises(ValueError, match="family qwen3 given.*llama, mistral, qwen2"):
            write(random(cfg), cfg)
    assert not (tmp_path / "new").exists()
