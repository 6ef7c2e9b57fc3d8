"""Perplexity, multiple choice and sizes equal their definitions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import evaluate, models
from jaxprune._choices import encode_pair

WORDS = "Question : Answer why what is the of a red blue green big small cat dog house . ? yes no".split()


def tokenizer(bos: bool = False):
    """One token a word, with the words of WORDS; `bos` puts <s> in front of a text."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocab = {w: i for i, w in enumerate(["<unk>", "<s>", *WORDS])}
    backend = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", model_max_length=8)


@pytest.fixture(scope="module")
def model(tiny):
    """The tiny model with weights that make a difference."""
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.4 * random.normal(size=x.shape), x.dtype), tiny.params), tiny.cfg


ITEMS = [
    dict(query="Question : why is the cat red ?", choices=["yes", "no", "the house is big ."], gold=1),
    dict(query="Question : what ?\n", choices=["a small dog", "of the"], gold=0),
    dict(query="Question : " + "is the cat of the big house a dog " * 5, choices=["yes .", "blue green red"], gold=0),
    dict(query="is the", choices=["cat", "dog", "house", "yes"], gold=3),
]


def test_a_uniform_model_has_its_vocabulary_as_perplexity(tiny):
    params = jax.tree.map(jnp.zeros_like, tiny.params)
    found = evaluate.perplexity(params, tiny.cfg, np.arange(50) % 64, window=8)
    assert found == dict(perplexity=pytest.approx(64, rel=1e-6), tokens=48, window=8)


@pytest.mark.parametrize("batch", [None, 1, 2, 5])
def test_perplexity_is_that_of_each_window_alone_whatever_the_batch(model, batch):
    params, cfg = model
    tokens = np.random.default_rng(1).integers(0, cfg.vocab, 43)
    logits = jax.jit(models.apply, static_argnames="cfg")(params, jnp.asarray(tokens[:40].reshape(5, 8)), cfg)
    nll = -np.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:40].reshape(5, 8)[:, 1:, None], -1)
    found = evaluate.perplexity(params, cfg, tokens, window=8, batch=batch)
    assert found["perplexity"] == pytest.approx(np.exp(nll.mean()), rel=1e-5)
    assert found["tokens"] == 40


def test_tokens_of_one_window_do_not_change_another(model):
    params, cfg = model
    tokens = np.random.default_rng(1).integers(0, cfg.vocab, 16)
    other = np.concatenate([tokens[:8], (tokens[8:] + 1) % cfg.vocab])

    def nll(tokens):
        return np.log(evaluate.perplexity(params, cfg, tokens, window=8, batch=2)["perplexity"])

    first = np.log(evaluate.perplexity(params, cfg, tokens[:8], window=8)["perplexity"])
    second, changed = (np.log(evaluate.perplexity(params, cfg, t[8:], window=8)["perplexity"]) for t in (tokens, other))
    assert nll(tokens) == pytest.approx((first + second) / 2, rel=1e-5)
    assert nll(other) == pytest.approx((first + changed) / 2, rel=1e-5)
    assert abs(second - changed) > 1e-2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(tokens=np.arange(7)), "7 tokens given, window 8 asked"),
        (dict(window=1), "at least 2"),
        (dict(batch=0), "at least 1"),
        (dict(tokens=np.full(8, 64)), "0 to 63"),
        (dict(tokens=np.full(8, -1)), "0 to 63"),
    ],
)
def test_perplexity_refuses_bad_arguments(tiny, change, words):
    arguments = dict(tokens=np.arange(8), window=8) | change
    with pytest.raises(ValueError, match=words):
        evaluate.perplexity(tiny.params, tiny.cfg, arguments.pop("tokens"), **arguments)


def test_a_text_begins_with_a_bos_only_if_the_tokenizer_adds_one():
    text = "the cat is red . " * 100  # longer than the tokenizer's model_max_length
    plain, with_bos = (evaluate.encode_text(tokenizer(bos), text) for bos in (False, True))
    assert len(plain) == 500 and plain.dtype == np.int32
    np.testing.assert_array_equal(with_bos, [1, *plain])
    assert len(evaluate.encode_text(tokenizer(), "")) == 0


@pytest.fixture(scope="module")
def scores(model):
    """The log-likelihood of each choice of each item, one text at a time, without padding."""
    params, cfg = model
    words, out = tokenizer(), []
    log_probabilities = jax.jit(lambda tokens: jax.nn.log_softmax(models.apply(params, tokens, cfg)[0]))
    for item in ITEMS:
        out.append(np.zeros(len(item["choices"])))
        for i, choice in enumerate(item["choices"]):
            context = words.encode(item["query"].strip() + "\nAnswer:", add_special_tokens=False)
            tokens = context + words.encode(choice, add_special_tokens=False)
            found = np.asarray(log_probabilities(jnp.array([tokens])))
            out[-1][i] = sum(found[t - 1, tokens[t]] for t in range(len(context), len(tokens)))
    return out


@pytest.mark.parametrize("batch", [None, 2])
def test_multiple_choice_is_the_brute_force(model, scores, batch):
    params, cfg = model
    for by_length in (False, True):
        divided = [s / [len(c) for c in i["choices"]] if by_length else s for s, i in zip(scores, ITEMS, strict=True)]
        best = [int(d.argmax()) for d in divided]
        items = [item | dict(gold=b) for item, b in zip(ITEMS, best, strict=True)]
        wrong = [item | dict(gold=(b + 1) % len(item["choices"])) for item, b in zip(ITEMS, best, strict=True)]
        key = "accuracy_normalised" if by_length else "accuracy"
        for questions, expected in ((items, 1.0), (wrong, 0.0), (items[:3] + wrong[3:], 0.75)):
            found = evaluate.multiple_choice(params, cfg, tokenizer(bos=True), questions, batch=batch)
            assert found[key] == expected and found["items"] == 4
    assert evaluate.multiple_choice(params, cfg, tokenizer(), ITEMS, limit=2, batch=batch)["items"] == 2


def test_log_likelihoods_are_the_brute_force(model, scores):
    from jaxprune._log_likelihoods import log_likelihoods

    params, cfg = model
    pairs = [encode_pair(tokenizer(), i["query"].rstrip() + "\nAnswer: ", c) for i in ITEMS for c in i["choices"]]
    found = {i: score for i, score, _ in log_likelihoods(params, cfg, pairs, max_length=cfg.max_positions)}
    np.testing.assert_allclose([found[i] for i in range(len(pairs))], np.concatenate(scores), rtol=1e-4)


def test_trailing_space_belongs_to_the_continuation():
    words = tokenizer()
    ids = {w: words.encode(w, add_special_tokens=False)[0] for w in WORDS}
    assert encode_pair(words, "the cat \n", "is red") == ([ids["the"], ids["cat"]], [ids["is"], ids["red"]])
    with pytest.raises(ValueError, match="no tokens"):
        encode_pair(words, " ", "is red")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: query, choices, gold missing"),
        ('{"query": "a", "choices": ["b", "c"]}', "line 2: gold missing"),
        ('{"query": 1, "choices": ["b", "c"], "gold": 0}', "query is 1"),
        ('{"query": "a", "choices": ["b"], "gold": 0}', "at least two"),
        ('{"query": "a", "choices": ["b", " "], "gold": 0}', "not empty"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "gold is 2; an index from 0 to 1"),
        ('{"query": "a", "choices": ["b", "c"], "gold": -1}', "gold is -1"),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}', "gold is True"),
    ],
)
def test_a_malformed_question_is_named(tmp_path, line, words):
    file = tmp_path / "questions.jsonl"
    file.write_text(f"{json.dumps(ITEMS[0])}\n{line}\n")
    with pytest.raises(ValueError, match=words):
        evaluate.load_choices(file)
    assert evaluate.load_choices(file, limit=1) == ITEMS[:1]


def test_files_without_questions_are_refused(tmp_path):
    file = tmp_path / "questions.jsonl"
    with pytest.raises(FileNotFoundError):
        evaluate.load_choices(file)
    file.write_text("\n")
    with pytest.raises(ValueError, match="no questions"):
        evaluate.load_choices(file)
    file.write_bytes(b'{"query": "\xff"}')
    with pytest.raises(ValueError, match="UTF-8"):
        evaluate.load_choices(file)
    with pytest.raises(ValueError, match="limit: 0"):
        evaluate.load_choices(file, limit=0)


def test_sizes_count_what_is_there(tiny):
    small = tiny.cfg.layers[2:]
    cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=small)
    all_, one = (evaluate.sizes(models.shapes(c), c, context=100) for c in (tiny.cfg, cfg))
    assert all_["parameters"] == models.count_parameters(tiny.cfg) == sum(x.size for x in jax.tree.leaves(tiny.params))
    assert all_["bytes"] == 4 * all_["parameters"]
    assert all_["decoder_parameters"] - one["decoder_parameters"] == 2 * tiny.cfg.matrix_parameters(tiny.cfg.layers[0])
    heads = 2 * tiny.cfg.layers[0].kv_heads * tiny.cfg.layers[0].q_per_kv
    expected = 2 * (all_["decoder_parameters"] - one["decoder_parameters"]) + 4 * 100 * heads * 8
    assert all_["flops_per_token"] - one["flops_per_token"] == expected


def test_all_of_it_with_progress(tiny):
    seen = []

    def progress(batches, what):
        seen.append((what, len(batches)))
        return batches

    found = evaluate.evaluate(
        tiny.params, tiny.cfg, tokenizer(), text="the cat is red . " * 5, window=8, max_tokens=16, choices=ITEMS, limit=2,
        timed=False, progress=progress,
    )  # fmt: skip
    assert (found["tokens"], found["window"], found["items"], found["context"]) == (16, 8, 2, 1024)
    assert {"perplexity", "accuracy", "accuracy_normalised", "parameters", "bytes", "flops_per_token"} <= found.keys()
    assert [what.split()[0] for what, _ in seen] == ["perplexity", "choices"]
    with pytest.raises(ValueError, match="max_tokens: 4"):
        evaluate.evaluate(tiny.params, tiny.cfg, tokenizer(), text="a", window=8, max_tokens=4)


def test_latency_measures_what_was_asked(tiny):
    found = evaluate.latency(tiny.params, tiny.cfg, prompt=4, new=2, repeats=1)
    assert (found["prompt_tokens"], found["new_tokens"]) == (4, 2)
    assert all(0 < found[f"{stage}_tokens_per_second"] < np.inf for stage in ("prefill", "decode"))
    with pytest.raises(ValueError, match="new: 0"):
        evaluate.latency(tiny.params, tiny.cfg, new=0)
