"""A decoder of image tokens, LlamaGen's class: positions in two dimensions, checkpoints, decoding, Numerical Pruning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import models, pipeline, surgery
from jaxprune.models import _rope, decode

ROWS, COLUMNS, CODES = 3, 4, 24
GRID = (("columns", COLUMNS), ("first", 1), ("rope_type", "grid"))
CFG = models.LlamaConfig(
    vocab=CODES + 4,
    d=32,
    head_dim=8,
    layers=(models.LayerDims(4, 1, 48),) * 3,
    rope_scaling=GRID,
    max_positions=1 + ROWS * COLUMNS,
)


@functools.cache
def made():
    """Parameters whose layers matter, and sequences of a class token and an image."""
    random = np.random.default_rng(0)
    images = random.integers(0, CODES, (24, ROWS * COLUMNS))
    tokens = np.concatenate([CODES + np.arange(24)[:, None] % 4, images], 1).astype(np.int32)
    params = models.init(jax.random.key(0), CFG)
    return jax.tree.map(lambda x: x if x.ndim < 2 else 4 * x, params), jnp.asarray(tokens)


def scores(q, k, cfg=CFG):
    """The attention logit of a query q at each position and a key k at each other, [t, t]."""
    t = cfg.max_positions
    rope = _rope.tables(cfg, jnp.arange(t), t)
    q, k = (np.asarray(_rope.rotate(jnp.broadcast_to(x, (1, t, cfg.head_dim)), *rope))[0] for x in (q, k))
    return q @ k.T


def test_logits_depend_on_the_row_and_column_offsets_alone():
    q, k = np.random.default_rng(1).normal(size=(2, CFG.head_dim)).astype(np.float32)
    image = scores(q, k)[1:, 1:].reshape(ROWS, COLUMNS, ROWS, COLUMNS)
    np.testing.assert_allclose(image[1:, :, 1:, :], image[:-1, :, :-1, :], atol=1e-5)  # both one row further down
    np.testing.assert_allclose(image[:, 1:, :, 1:], image[:, :-1, :, :-1], atol=1e-5)  # both one column further right
    distinct = np.unique(image.round(4)).size
    assert distinct == (2 * ROWS - 1) * (2 * COLUMNS - 1)  # and each offset has a logit of its own


def test_the_class_token_is_not_rotated():
    q, k = np.random.default_rng(1).normal(size=(2, CFG.head_dim)).astype(np.float32)
    np.testing.assert_allclose(scores(q, k)[0, 0], q @ k, rtol=1e-5)
    cos, sin = _rope.tables(CFG, jnp.arange(1), 1)
    assert (cos == 1).all() and (sin == 0).all()


def llamagen_angles(grid: int, head_dim: int, base: float = 10000.0) -> np.ndarray:
    """The angles of LlamaGen's `precompute_freqs_cis_2d` at the image tokens, float64[grid * grid, head_dim / 2].

    Half of the head turns with the row, half with the column: pair i of each half by base^(-2 i / (head_dim / 2)) a step.
    """
    half = head_dim // 2
    angles = np.outer(np.arange(grid), base ** -(np.arange(0, half, 2) / half))  # grid, head_dim / 4
    by_row = np.broadcast_to(angles[:, None, :], (grid, grid, half // 2))
    by_column = np.broadcast_to(angles[None, :, :], (grid, grid, half // 2))
    return np.concatenate([by_row, by_column], -1).reshape(grid * grid, half)


@pytest.mark.parametrize(("grid", "head_dim", "prefix"), [(4, 8, 1), (16, 64, 1), (5, 16, 3)])
def test_rotations_are_llamagens(grid, head_dim, prefix):
    scaling = (("columns", grid), ("first", prefix), ("rope_type", "grid"))
    cfg = models.LlamaConfig(vocab=8, d=32, head_dim=head_dim, layers=CFG.layers, rope_scaling=scaling)
    cos, sin = _rope.tables(cfg, jnp.arange(prefix + grid * grid), prefix + grid * grid)
    angles = llamagen_angles(grid, head_dim)
    np.testing.assert_allclose(cos[prefix:], np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(sin[prefix:], np.sin(angles), atol=1e-5)
    assert (cos[:prefix] == 1).all() and (sin[:prefix] == 0).all()


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("layers", [CFG.layers, (*CFG.layers[:2], models.LayerDims(3, 1, 40))])
def test_a_checkpoint_keeps_the_grid(tmp_path, layers, first):
    scaling = (("columns", COLUMNS), ("first", first), ("rope_type", "grid"))
    cfg = models.LlamaConfig(
        vocab=CFG.vocab, d=CFG.d, head_dim=8, layers=layers, rope_scaling=scaling, max_positions=CFG.max_positions
    )
    params = models.init(jax.random.key(0), cfg)
    models.save(tmp_path, params, cfg)
    loaded, read = models.load(tmp_path)
    assert read == cfg
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize(("key", "value"), [("columns", 0), ("columns", 2.5), ("first", -1), ("first", None)])
def test_a_grid_that_makes_no_sense_is_refused(key, value):
    config = models.to_hf_config(CFG)
    config["rope_parameters"][key] = value
    with pytest.raises(ValueError, match=f"config.json: .*{key}"):
        models.from_hf_config(config)


def test_decoding_equals_the_whole_sequence():
    params, tokens = made()
    tokens = tokens[:2]
    whole = jax.jit(models.apply, static_argnames="cfg")(params, tokens, CFG)
    logits, cache = decode.prefill(params, tokens[:, :1], CFG, decode.init_cache(CFG, 2, CFG.max_positions))
    for position in range(1, CFG.max_positions):
        np.testing.assert_allclose(logits, whole[:, position - 1], atol=2e-5)
        logits, cache = decode.step(params, tokens[:, position], position, CFG, cache)


def settings(**options):
    return pipeline.Settings(method="numerical", ratio=0.3, multiple_of=4, **options)


def test_the_masked_decoder_equals_the_cut_one():
    params, tokens = made()
    small = pipeline.prune(params, CFG, tokens, settings(reconstruct="none"))
    assert small.cfg.rope_scaling == GRID and small.cfg.decoder_parameters < 0.75 * CFG.decoder_parameters
    masked = models.apply(params, tokens, CFG, surgery.gates_of(small.plan, CFG))
    np.testing.assert_allclose(models.apply(small.params, tokens, small.cfg), masked, atol=1e-4)


@pytest.mark.parametrize(("units", "axis"), [("kv", "k"), ("mlp", "f")])
def test_compensation_brings_a_layers_output_closer(units, axis):
    params, tokens = made()

    def after(p, cfg):
        """The residual stream after the pruned part of the first layer, whose inputs no cut has changed."""
        return models.observe(p, tokens, lambda layer: layer[axis].after, cfg)[0]

    errors = {}
    for target in ("none", "weights"):
        small = pipeline.prune(params, CFG, tokens, settings(units=(units,), ranking="local", reconstruct=target))
        assert small.cfg.layers[0] != CFG.layers[0]
        errors[target] = float(jnp.linalg.norm(after(small.params, small.cfg) - after(params, CFG)))
    assert errors["weights"] < errors["none"]
