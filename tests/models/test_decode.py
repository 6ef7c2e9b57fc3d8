"""Generation with a cache equals the model without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import models
from jaxprune.models import LayerDims, LlamaConfig, _attention, decode

BASE = dict(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 48),) * 2 + (LayerDims(1, 2, 40),))
GONE = (LayerDims(2, 2, 48), LayerDims(0, 0, 48), LayerDims(0, 0, 0), LayerDims(1, 3, 0), LayerDims(2, 2, 48))
DYNAMIC = (("factor", 2.0), ("rope_type", "dynamic"))
CONFIGS = dict(
    plain=BASE,
    gone=BASE | dict(layers=GONE, biases=("q", "k", "v", "o", "down")),
    no_attention=BASE | dict(layers=(LayerDims(0, 0, 48),) * 2),
    pairs=BASE | dict(layers=(*BASE["layers"], LayerDims(2, 2, 40, (0, 2)), LayerDims(1, 3, 0, (3,)))),
    window=BASE | dict(sliding_window=3),
    dynamic=BASE | dict(rope_scaling=DYNAMIC, max_positions=6),
    tied=BASE | dict(tie_embeddings=True),
    qk_norm=BASE | dict(qk_norm=True),
    partial=BASE | dict(partial_rotary=0.5),
    post_norms=BASE | dict(post_norms=True),
    kinds=BASE | dict(sliding_window=3, windowed=(True, False, True), local_rope_theta=50.0, score_cap=1.0, logit_cap=2.0),
    gemma=BASE | dict(norm_offset=True, embed_scale=6.0, activation="gelu_pytorch_tanh"),
)


whole_sequence = jax.jit(models.apply, static_argnames="cfg")


@functools.cache
def make(name):
    cfg = LlamaConfig(**CONFIGS[name])
    leaves, tree = jax.tree.flatten(models.shapes(cfg))
    random = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [jnp.asarray(0.4 * random.normal(size=x.shape), x.dtype) for x in leaves]), cfg


def tokens_of(b, t, seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(0, BASE["vocab"], (b, t)), jnp.int32)


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_logits_equal_those_of_the_whole_sequence(name):
    params, cfg = make(name)
    tokens = tokens_of(2, 12)
    whole = whole_sequence(params, tokens, cfg)
    logits, cache = decode.prefill(params, tokens[:, :5], cfg, decode.init_cache(cfg, 2, 12))
    for position in range(5, 13):
        np.testing.assert_allclose(logits, whole[:, position - 1], atol=2e-5)
        if position < 12:
            logits, cache = decode.step(params, tokens[:, position], position, cfg, cache)


@pytest.mark.parametrize("name", ["plain", "window"])
def test_left_padding_changes_nothing(name):
    params, cfg = make(name)
    rows, pad = [tokens_of(1, 4), tokens_of(1, 7, seed=2)], jnp.array([3, 0])
    prompt = jnp.concatenate([jnp.pad(rows[0], ((0, 0), (3, 0))), rows[1]])
    logits, cache = decode.prefill(params, prompt, cfg, decode.init_cache(cfg, 2, 10), pad)
    alone = [decode.prefill(params, row, cfg, decode.init_cache(cfg, 1, 10)) for row in rows]
    np.testing.assert_allclose(logits, jnp.concatenate([a for a, _ in alone]), atol=2e-5)
    token = jnp.array([9, 8])
    logits, _ = decode.step(params, token, 7, cfg, cache, pad)
    for i, (row, (_, cache)) in enumerate(zip(rows, alone, strict=True)):
        single, _ = decode.step(params, token[i : i + 1], row.shape[1], cfg, cache)
        np.testing.assert_allclose(logits[i], single[0], atol=2e-5)


@pytest.mark.parametrize("name", ["plain", "gone"])
def test_greedy_generation_is_the_repeated_argmax(name):
    params, cfg = make(name)
    prompt = tokens_of(2, 4)
    new = decode.generate(params, cfg, prompt, max_new_tokens=6)
    assert new.shape == (2, 6)
    whole = whole_sequence(
        params, jnp.concatenate([prompt, new], 1), cfg
    )  # causal: the argmax at i is that of the tokens up to i
    np.testing.assert_array_equal(new, whole[:, 3:-1].argmax(-1))


def test_sequences_stop_at_their_end_token_and_the_batch_with_the_last():
    params, cfg = make("plain")
    prompt = tokens_of(2, 4)
    free = decode.generate(params, cfg, prompt, max_new_tokens=8)
    end = int(free[0, 2])
    first = [int(np.argmax(np.append(row, end) == end)) for row in free]
    new = decode.generate(params, cfg, prompt, max_new_tokens=8, eos_ids=(63 if end != 63 else 62, end))
    assert new.shape[1] <= min(8, max(first) + 1)
    for row, plain, at in zip(new, free, first, strict=True):
        np.testing.assert_array_equal(row[: at + 1], plain[: len(row)][: at + 1])
        assert (row[at:] == end).all()


def test_sampling_follows_the_model_and_the_key():
    params, cfg = make("plain")
    prompt = jnp.repeat(tokens_of(1, 4), 4000, 0)

    def sample(seed, temperature):
        options = dict(max_new_tokens=1, temperature=temperature, key=jax.random.key(seed))
        return decode.generate(params, cfg, prompt, **options)[:, 0]

    np.testing.assert_array_equal(sample(0, 2.0), sample(0, 2.0))
    assert (sample(0, 2.0) != sample(1, 2.0)).any()
    expected = jax.nn.softmax(whole_sequence(params, prompt[:1], cfg)[0, -1] / 2.0)
    found = np.bincount(sample(0, 2.0), minlength=cfg.vocab) / len(prompt)
    assert np.abs(found - expected).sum() < 0.5 * np.abs(np.full(cfg.vocab, 1 / cfg.vocab) - expected).sum()
    np.testing.assert_array_equal(sample(0, 1e-4), decode.generate(params, cfg, prompt, max_new_tokens=1)[:, 0])


def test_streaming_yields_what_generate_returns_and_the_room_does_not_matter():
    params, cfg = make("plain")
    prompt = tokens_of(2, 4)
    new = decode.generate(params, cfg, prompt, max_new_tokens=5)
    stream = decode.stream(params, cfg, prompt, max_new_tokens=5, length=20)
    np.testing.assert_array_equal(np.stack(list(stream), 1), new)


def test_low_rank_arrays_are_used():
    params, cfg = make("plain")
    prompt = tokens_of(2, 4)
    random = np.random.default_rng(3)
    a, b = random.normal(size=(2, 32, 4)).astype(np.float32), random.normal(size=(2, 4, 48)).astype(np.float32)
    adapted = params | {"run_0": params["run_0"] | dict(up_a=a, up_b=b)}
    merged = params | {"run_0": params["run_0"] | dict(up=params["run_0"]["up"] + a @ b)}
    logits = [decode.prefill(p, prompt, cfg, decode.init_cache(cfg, 2, 4))[0] for p in (adapted, merged)]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)


def test_the_cache_of_bfloat16_parameters_is_bfloat16():
    params, cfg = make("plain")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    logits, cache = decode.prefill(params, tokens_of(1, 4), cfg, decode.init_cache(cfg, 1, 4, jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)} and logits.dtype == jnp.float32
    assert decode.generate(params, cfg, tokens_of(1, 4), max_new_tokens=2).shape == (1, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(prompt=np.zeros((1, 0), int)), "at least one sequence of one token"),
        (dict(prompt=np.array([[64]])), "vocabulary is 0 to 63"),
        (dict(prompt=np.array([[-1]])), "vocabulary is 0 to 63"),
        (dict(max_new_tokens=0), "at least 1"),
        (dict(length=7), "at least 8"),
        (dict(temperature=-1.0), "positive"),
        (dict(temperature=float("nan")), "positive"),
        (dict(temperature=1.0), "jax.random.key"),
        (dict(pad=[4]), "0 to 3"),
        (dict(pad=[0, 0]), "1 numbers"),
    ],
)
def test_bad_arguments_are_refused(change, words):
    params, cfg = make("plain")
    arguments = dict(prompt=tokens_of(1, 4), max_new_tokens=4) | change
    with pytest.raises(ValueError, match=words):
        decode.stream(params, cfg, arguments.pop("prompt"), **arguments)


def test_a_prompt_longer_than_the_cache_is_refused():
    params, cfg = make("plain")
    with pytest.raises(ValueError, match="5 tokens given, the cache has room for 4"):
        decode.prefill(params, tokens_of(1, 5), cfg, decode.init_cache(cfg, 1, 4))
    with pytest.raises(ValueError, match="0 sequences"):
        decode.init_cache(cfg, 0, 4)


@pytest.mark.parametrize("window", [None, 1, 70])
@pytest.mark.parametrize("t", [1, 65, 600])
def test_blocks_of_queries_equal_attention_written_out(t, window):
    random = np.random.default_rng(0)
    q = random.normal(size=(2, t, 2, 3, 8)).astype(np.float32)
    k, v = random.normal(size=(2, 2, t + 5, 2, 8)).astype(np.float32)
    mask_from = np.array([0, 2])
    positions, s = 5 + np.arange(t)[:, None], np.arange(t + 5)
    seen = (s <= positions) & (s > positions - (window or t + 5)) & (s >= mask_from[:, None, None])
    weights = np.where(seen[:, None, None], np.exp(np.einsum("btkgh,bskh->bkgts", q, k) * 0.3), 0)
    expected = np.einsum("bkgts,bskh->btkgh", weights / weights.sum(-1, keepdims=True), v)
    skipping = jax.jit(_attention.attend, static_argnums=(3, 4, 5))
    masking = jax.jit(_attention.attend, static_argnums=(3, 5))  # the start is not known when it is compiled
    for attend in (skipping, masking):
        np.testing.assert_allclose(attend(q, k, v, 0.3, 5, window, mask_from), expected, atol=1e-5)
