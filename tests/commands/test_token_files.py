"""Token ids in a `.npy` file, for a model that has no tokenizer."""

import hashlib
import json

import jax
import numpy as np
import pytest

from jaxprune import data, models

N, T, CODES = 12, 17, 24


@pytest.fixture
def images(tmp_path):
    """The folders of a decoder of 4 x 4 image tokens without a tokenizer, and its tokens."""
    scaling = (("columns", 4), ("first", 1), ("rope_type", "grid"))
    cfg = models.LlamaConfig(
        vocab=CODES + 4, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 2, rope_scaling=scaling, max_positions=T
    )
    models.save(tmp_path / "decoder", models.init(jax.random.key(0), cfg), cfg)
    rows = np.random.default_rng(0).integers(0, CODES, (N, T))
    rows[:, 0] = CODES + np.arange(N) % 4
    np.save(tmp_path / "tokens.npy", rows)
    return tmp_path / "decoder", tmp_path / "tokens.npy", rows


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("flags", "samples", "length"), [(("--method", "numerical", "--samples", 8, "--length", 16), 8, 16), ((), N, T)]
)
def test_a_model_of_image_tokens_is_pruned_and_verified(jaxprune, images, tmp_path, flags, samples, length):
    model, tokens, _ = images
    done = jaxprune("prune", model, "--out", tmp_path / "small", "--calibration", tokens, *flags)
    assert done.status == 0, done.err
    record = read(tmp_path / "small" / "jaxprune.json")
    assert record["calibration"]["sha256"] == hashlib.sha256(tokens.read_bytes()).hexdigest()
    assert (record["calibration"]["samples"], record["calibration"]["length"]) == (samples, length)
    assert record["calibration"]["fit_length"] == length
    assert not list((tmp_path / "small").glob("tokenizer*"))
    assert models.checkpoint.read_config(tmp_path / "small").rope_scaling == models.checkpoint.read_config(model).rope_scaling
    assert jaxprune("verify", model, tmp_path / "small", "--text", tokens, "--length", T).status == 0


def test_perplexity_is_that_of_the_rows(jaxprune, images, tmp_path):
    model, tokens, rows = images
    command = ("evaluate", model, "--text", tokens, "--json", tmp_path / "e.json")
    assert jaxprune(*command).status == 0
    whole = read(tmp_path / "e.json")
    params, cfg = models.load(model)
    loss = float(models.loss_fn(cfg)(params, {}, jax.numpy.asarray(rows, "int32")).mean())
    assert whole["perplexity"] == pytest.approx(np.exp(loss), rel=1e-5)
    assert (whole["window"], whole["tokens"]) == (T, N * T)

    assert jaxprune(*command, "--window", 8, 4, 40, "--max-tokens", 2 * T + 1).status == 0
    part = read(tmp_path / "e.json")
    assert (part["window"], part["tokens"]) == (8, 16) and {"perplexity_at_4", f"perplexity_at_{T}"} <= part.keys()


def test_blocks_are_the_beginnings_of_different_rows(images):
    _, tokens, rows = images
    found = [data.token_blocks(str(tokens), None, samples=N - 2, length=5, seed=seed).tokens for seed in (0, 0, 1)]
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()
    allowed = {tuple(row) for row in rows[:, :5]}
    assert len({tuple(row) for row in found[0]} & allowed) == N - 2


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (lambda x: x.astype(float), (), "float64[12, 17] given; integers [sequences, tokens] are needed"),
        (lambda x: x[0], (), "int64[17] given"),
        (lambda x: x[:0], (), "int64[0, 17] given"),
        (lambda x: x[:, :1], (), "int64[12, 1] given"),
        (lambda x: x - 1, (), "token ids -1 to 26 given; allowed are those of the vocabulary"),
        (lambda x: x + 1, (), "the file has token 28, the model has 0 to 27; give a file that belongs to the model"),
        (lambda x: x, ("--length", T + 1), "its rows have 17 tokens; 18 were asked for; lower length"),
        (lambda x: x, ("--samples", N + 1), "it has 12 rows; 13 were asked for; lower samples"),
    ],
)
def test_rows_that_cannot_be_used(refused, images, tmp_path, change, flags, message):
    model, tokens, rows = images
    np.save(tokens, change(rows))
    assert message in refused("prune", model, "--out", tmp_path / "out", "--calibration", tokens, *flags)


def test_files_that_cannot_be_used(refused, images, tmp_path):
    model, tokens, _ = images
    for command in (("prune", model, "--out", tmp_path / "out", "--calibration"), ("evaluate", model, "--text")):
        assert "no such file; give a .npy file of token ids" in refused(*command, tmp_path / "nowhere.npy")
        assert "no tokenizer.json" in refused(*command, "builtin")
    assert "max_tokens: 16 given, a sequence has 17" in refused("evaluate", model, "--text", tokens, "--max-tokens", 16)
    tokens.write_text("not of NumPy")
    assert "not a complete .npy file of numbers" in refused("evaluate", model, "--text", tokens)
