import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jaxprune import data


def word_tokenizer(text: str, bos: bool = False) -> PreTrainedTokenizerFast:
    """Each word and each run of other characters is a token, so token ids can be compared with words."""
    words = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *sorted(set(text.split()))])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(alphabet, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@pytest.fixture
def words(tmp_path):
    """A text of 400 different words in order, and its tokenizer: the ids of a window are consecutive."""
    text = " ".join(f"w{i:03d}" for i in range(400))
    (tmp_path / "text.txt").write_text(text)
    return str(tmp_path / "text.txt"), word_tokenizer(text)


def write_jsonl(path, records) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def blocks(source, tokenizer, *, samples=6, length=20, seed=0, **options):
    return data.token_blocks(source, tokenizer, samples=samples, length=length, seed=seed, **options)


def test_windows_come_from_the_text_and_do_not_overlap(words):
    source, tokenizer = words
    for samples, length in [(6, 20), (20, 20), (1, 400)]:
        tokens = blocks(source, tokenizer, samples=samples, length=length).tokens
        assert tokens.shape == (samples, length) and tokens.dtype == np.int32
        assert (np.diff(tokens, axis=1) == 1).all()
        assert np.unique(tokens).size == samples * length


def test_the_same_text_and_seed_give_the_same_windows(words):
    first, again, other = (blocks(*words, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert first.sha256 == again.sha256 == other.sha256
    assert (first.tokens != other.tokens).any()


def test_every_placement_of_windows_is_reached(words):
    source, tokenizer = words
    starts = {tuple(sorted(blocks(source, tokenizer, samples=2, length=199, seed=s).tokens[:, 0] - 3)) for s in range(100)}
    assert starts == {(a, b) for a in range(3) for b in range(a + 199, 202)}


def test_sha256_is_that_of_the_file(words):
    source, tokenizer = words
    assert blocks(source, tokenizer).sha256 == hashlib.sha256(Path(source).read_bytes()).hexdigest()


def test_line_ends_and_wide_characters_survive_chunked_reading(tmp_path):
    text = "a\r\n" + "é漢🙂" * (2**18) + "\rz\n"
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    assert "".join(data.read_text(str(path)).pieces) == text


def test_a_long_text_is_read_as_far_as_it_is_needed(tmp_path):
    text = " ".join(f"w{i % 50}" for i in range(800_000))
    (tmp_path / "text.txt").write_text(text)
    got = blocks(str(tmp_path / "text.txt"), word_tokenizer(text))
    assert got.available < 800_000
    assert got.sha256 != hashlib.sha256(text.encode()).hexdigest()


def test_a_longer_beginning_is_read_when_the_first_has_too_few_tokens(tmp_path):
    text = "x" * 2**21 + " a b c d e f g"
    (tmp_path / "text.txt").write_text(text)
    got = blocks(str(tmp_path / "text.txt"), word_tokenizer("a b c d e f g"), samples=1, length=8)
    assert got.tokens.tolist() == [[0, 3, 4, 5, 6, 7, 8, 9]]


def test_jsonl_documents_are_joined_by_blank_lines(tmp_path, byte_tokenizer):
    source = write_jsonl(tmp_path / "x.jsonl", [{"text": "ab"}, {"text": "cd"}]) + ":text"
    got = blocks(source, byte_tokenizer, samples=1, length=6)
    assert byte_tokenizer.decode(got.tokens[0]) == "ab\n\ncd"
    assert got.sha256 == hashlib.sha256(b"ab\n\ncd").hexdigest()


def test_document_windows_lie_in_one_document_each(tmp_path):
    documents = [" ".join(f"d{d}w{i:02d}" for i in range(5 + 5 * d)) for d in range(8)]
    tokenizer = word_tokenizer(" ".join(documents))
    source = write_jsonl(tmp_path / "x.jsonl", [{"text": d} for d in documents]) + ":text"
    rows = [tokenizer.decode(row).split() for row in blocks(source, tokenizer, windows="documents", samples=4).tokens]
    owners = [{word[:2] for word in row} for row in rows]
    assert all(len(owner) == 1 for owner in owners) and len(set.union(*owners)) == 4
    assert all(" ".join(row) in documents[int(row[0][1])] for row in rows)
    with pytest.raises(ValueError, match="5 of 8 documents have 20 tokens or more"):
        blocks(source, tokenizer, windows="documents", samples=6)


def test_builtin_is_the_text_of_python_in_a_fixed_order(byte_tokenizer):
    from pydoc_data.topics import topics

    got, heldout = blocks("builtin", byte_tokenizer), blocks("builtin-heldout", byte_tokenizer)
    names = sorted(topics)
    joined = "\n\n".join(topics[k] for i, k in enumerate(names) if i % 7 != 6)
    assert got.sha256 == hashlib.sha256(joined.encode()).hexdigest()
    assert all(byte_tokenizer.decode(row) in joined for row in got.tokens)
    assert heldout.sha256 == hashlib.sha256("\n\n".join(topics[k] for k in names[6::7]).encode()).hexdigest()


def test_arrays_are_taken_in_order_and_cut():
    arrays = [np.arange(30), np.arange(100).reshape(2, 50), np.arange(7, 29)]
    got = blocks(iter(arrays), None, samples=3, length=20)
    np.testing.assert_array_equal(got.tokens[:, 0], [0, 0, 50])
    with pytest.raises(ValueError, match="4 blocks of 20 tokens found; 5 were asked for"):
        blocks(arrays, None, samples=5, length=20)
    for bad in (np.zeros(30), np.zeros((1, 2, 30), int), np.zeros(19, int)):
        with pytest.raises(ValueError, match="t >= 20 are needed"):
            blocks([bad], None)


def test_self_calibration_is_sampled_from_the_model(tiny):
    def draw(samples, length, seed):
        key = jax.random.key(seed)
        return data.self_blocks(tiny.params, tiny.cfg, samples=samples, length=length, key=key, bos_id=3, batch_size=2)

    first, again, other = (blocks("self", None, samples=5, length=9, seed=s, sampler=draw) for s in (0, 0, 1))
    assert first.tokens.shape == (5, 9) and (first.tokens[:, 0] == 3).all()
    assert len({row.tobytes() for row in first.tokens}) == 5
    assert first.sha256 == again.sha256 != other.sha256
    with pytest.raises(ValueError, match="give bos_id"):
        data.self_blocks(tiny.params, tiny.cfg, samples=1, length=9, key=jax.random.key(0))
    with pytest.raises(ValueError, match="needs a sampler"):
        blocks("self", None)


def test_text_shorter_than_asked(words):
    with pytest.raises(ValueError, match="has 400 tokens; 10 x 64 = 640 were asked for; lower samples or length"):
        blocks(*words, samples=10, length=64)


@pytest.mark.parametrize(
    ("name", "content", "suffix", "message"),
    [
        ("x.txt", b"a" * (2**20 - 1) + b"\xe6\xbczz", "", f"not UTF-8 at byte {2**20 - 1} "),
        ("x.txt", b"abc\xe6", "", "not UTF-8 at byte 3"),
        ("x.txt", b" \n\n", "", "there is no text in it"),
        ("x.jsonl", b"", ":text", "there is no text in it"),
        ("x.jsonl", b'{"text": "a"}\n\n{"txt": "b"}\n', ":text", r"line 3: no field 'text'; it has \['txt'\]"),
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', ":text", "line 2: not JSON"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', ":text", "line 2: not UTF-8 at byte 24"),
        ("x.jsonl", b'{"text": "a"}\n["b"]\n', ":text", "line 2: a list stands where a JSON object is needed"),
        ("x.jsonl", b"null\n", ":text", "line 1: a NoneType stands where"),
        ("x.jsonl", b'{"text": 3}\n', ":text", "line 1: field 'text' is a int; text is needed"),
        ("x.jsonl", b'{"text": "a"}\n', "", "which field holds the text"),
        ("x.jsonl", b'{"text": "a"}\n', ":", "name of the field is missing"),
    ],
)
def test_bad_files_are_named(tmp_path, byte_tokenizer, name, content, suffix, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        blocks(f"{tmp_path / name}{suffix}", byte_tokenizer)
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["hub:", "hub::config", "hub:a:b:c:d:e"])
def test_malformed_hub_sources(source, byte_tokenizer):
    with pytest.raises(ValueError, match=r"write hub:NAME\[:CONFIG"):
        blocks(source, byte_tokenizer)


def test_the_hub_out_of_reach_is_one_line(monkeypatch, byte_tokenizer):
    import datasets

    def load_dataset(*args, **options):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match=r"hub:name: cannot be read \(Couldn't reach the Hub\); check the name and the network"
    ):
        blocks("hub:name", byte_tokenizer)


def test_a_hub_dataset_is_streamed(tmp_path, monkeypatch, byte_tokenizer):
    import datasets

    local = write_jsonl(tmp_path / "x.jsonl", [{"body": "first text"}, {"body": "second text"}])
    load, seen = datasets.load_dataset, []

    def load_dataset(name, config, *, split, streaming):
        seen.append((name, config, split, streaming))
        return load("json", data_files=local, split="train", streaming=streaming, cache_dir=str(tmp_path))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    got = blocks("hub:some/name::validation:body", byte_tokenizer, samples=1, length=23)
    assert byte_tokenizer.decode(got.tokens[0]) == "first text\n\nsecond text"
    assert seen == [("some/name", None, "validation", True)]


def test_missing_files_and_folders(tmp_path, byte_tokenizer):
    with pytest.raises(FileNotFoundError, match="no such file; give a text file"):
        blocks(str(tmp_path / "none.txt"), byte_tokenizer)
    with pytest.raises(FileNotFoundError, match="no such file"):
        blocks(str(tmp_path / "none.jsonl:text"), byte_tokenizer)
    with pytest.raises(IsADirectoryError, match="a folder was given"):
        blocks(str(tmp_path), byte_tokenizer)


@pytest.mark.parametrize("options", [dict(samples=0), dict(length=1), dict(windows="rows"), dict(windows="documents")])
def test_bad_arguments(words, options):
    with pytest.raises(ValueError, match="ask for at least|allowed are|without documents"):
        blocks(*words, **options)


def test_check_sha256():
    data.check_sha256("ab", "ab")
    with pytest.raises(ValueError, match="SHA-256 cd given, ab recorded"):
        data.check_sha256("ab", "cd")
