"""Tokenizers that we assemble, against transformers' converter, SentencePiece and published expressions."""

import json
import random
from pathlib import Path

import pytest

from jaxprune import models
from jaxprune.models import _gguf_tokenizer
from jaxprune.models._gguf_tokenizer import CONTROL, USER_DEFINED, Vocabulary

TEXTS = (
    "Hello world",
    "  two  spaces\t\ttabs\r\n\n\n newlines   ",
    "héllo wörld 你好，世界 😀 ñ ｆｕｌｌ \u200b zero width",
    "def f(x):\n    return x ** 2 + 10  # comment\n\n\tif a<=b: pass",
    "It's I'll we've DON'T",
    "in 1984 and 3.14159, 1,000,000; 7x8",
    "",
    " ",
    "a" * 60,
    "\u0065\u0301 decomposed",
)


def vocabulary(**changes) -> Vocabulary:
    defaults = dict(kind="gpt2", pre="gpt-2", tokens=[], types=[], scores=[], merges=[], special={}, add_bos=False)
    return Vocabulary(**defaults | dict(add_eos=False, space_prefix=True, chat_template=None) | changes)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Path:
    """A folder with `tokenizer.model`, trained on this repository's kind of text."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("pieces")
    words = (
        json.dumps(TEXTS, ensure_ascii=False).split() + "the quick brown fox jumps over the lazy dog again and again".split()
    )
    draw = random.Random(0)
    lines = [" ".join(draw.choices(words, k=12)) for _ in range(400)]
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=450,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        character_coverage=0.98,
        user_defined_symbols=["<mark>"],
        minloglevel=2,
    )
    return folder


def write_gguf(path: Path, folder: Path, **extra) -> Path:
    """The vocabulary of `tokenizer.model` as llama.cpp's converter writes it."""
    import gguf
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    n = range(model.vocab_size())
    kinds = [
        2
        if model.is_unknown(i)
        else 3
        if model.is_control(i)
        else 6
        if model.is_byte(i)
        else 4
        if model.id_to_piece(i) == "<mark>"
        else 1
        for i in n
    ]
    out = gguf.GGUFWriter(path, "llama")
    out.add_tokenizer_model("llama")
    out.add_token_list([model.id_to_piece(i) for i in n])
    out.add_token_scores([model.get_score(i) for i in n])
    out.add_token_types(kinds)
    out.add_bos_token_id(model.bos_id())
    out.add_eos_token_id(model.eos_id())
    out.add_unk_token_id(model.unk_id())
    for key, value in extra.items():
        out.add_bool(f"tokenizer.ggml.{key}", value)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.mark.parametrize("source", ["folder", "gguf"])
def test_sentencepiece_ids_are_its_own(pieces, tmp_path, source):
    import sentencepiece

    original = sentencepiece.SentencePieceProcessor(str(pieces / "tokenizer.model"))
    ours = models.load_tokenizer(pieces if source == "folder" else write_gguf(tmp_path / "m.gguf", pieces))
    for text in (*TEXTS, "the quick  brown fox 123 \U0001f9ea"):
        assert ours(text).input_ids == [original.bos_id(), *original.encode(text)]
        assert ours.decode(ours(text).input_ids, skip_special_tokens=True) == text
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == ("<s>", "</s>", "<unk>")


def test_sentencepiece_in_gguf_equals_transformers(pieces, tmp_path):
    """Except that transformers adds no space before a text that starts with one, which SentencePiece does."""
    import transformers

    path = write_gguf(tmp_path / "m.gguf", pieces)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours = models.load_tokenizer(path)
    for text in TEXTS:
        if not text.startswith(" "):
            assert ours(text, add_special_tokens=False).input_ids == theirs(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True), (False, False)])
def test_bos_and_eos_as_the_metadata_say(pieces, tmp_path, bos, eos):
    tokenizer = models.load_tokenizer(write_gguf(tmp_path / "m.gguf", pieces, add_bos_token=bos, add_eos_token=eos))
    ids = tokenizer("dog").input_ids
    assert (ids[0] == tokenizer.bos_token_id, ids[-1] == tokenizer.eos_token_id) == (bos, eos)
    pair = tokenizer("dog", "fox").input_ids
    assert pair == ids + tokenizer("fox").input_ids


def test_without_the_space_in_front(pieces, tmp_path):
    tokenizer = models.load_tokenizer(write_gguf(tmp_path / "m.gguf", pieces, add_space_prefix=False, add_bos_token=False))
    assert tokenizer.decode(tokenizer(" dog").input_ids) == " dog"
    assert tokenizer.convert_ids_to_tokens(tokenizer("dog").input_ids)[0] != "▁dog"


def test_special_tokens_are_not_cut(pieces, tmp_path):
    tokenizer = models.load_tokenizer(write_gguf(tmp_path / "m.gguf", pieces))
    ids = tokenizer("dog</s><mark>fox", add_special_tokens=False).input_ids
    assert tokenizer.eos_token_id in ids and tokenizer.convert_tokens_to_ids("<mark>") in ids
    assert "</s>" not in tokenizer.decode(ids, skip_special_tokens=True)
    assert "<mark>" in tokenizer.decode(ids, skip_special_tokens=True)


def test_a_saved_tokenizer_gives_the_same_ids(pieces, tmp_path, tiny):
    import transformers

    tokenizer = models.load_tokenizer(pieces)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    models.save(tmp_path, tiny.params, tiny.cfg, tokenizer)
    for again in (models.load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)):
        assert [again(t).input_ids for t in TEXTS] == [tokenizer(t).input_ids for t in TEXTS]
        assert (again.bos_token_id, again.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert again.chat_template == tokenizer.chat_template


def words(pre: str, text: str) -> list[str]:
    """What a pre-tokenizer splits ASCII text into."""
    tokenizer = _gguf_tokenizer._byte_level(vocabulary(pre=pre))
    split = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [word.replace("Ġ", " ").replace("Ċ", "\n") for word, _ in split]


@pytest.mark.parametrize(
    ("pre", "wanted"),
    [
        ("gpt-2", ["a", " ", " 12345", " It", "'s", " x", "!?", "\n", "\n", "y"]),
        ("smollm", ["a", "  ", "1", "2", "3", "4", "5", " It", "'s", " x", "!?", "\n", "\n", "y"]),
        ("llama-bpe", ["a", " ", " ", "123", "45", " It", "'s", " x", "!?\n\n", "y"]),
        ("qwen2", ["a", " ", " ", "1", "2", "3", "4", "5", " It", "'s", " x", "!?\n\n", "y"]),
        ("tekken", ["a", " ", " ", "1", "2", "3", "4", "5", " It", "'s", " x", "!?\n\n", "y"]),
        ("default", ["a", " ", " ", "123", "45", " It", "'", "s", " x", "!?", "\n", "\n", "y"]),
    ],
)
def test_words_of_each_pre_tokenizer(pre, wanted):
    assert words(pre, "a  12345 It's x!?\n\ny") == wanted


@pytest.mark.parametrize("pre", sorted(_gguf_tokenizer.SPLITS))
def test_no_pre_tokenizer_loses_text(pre):
    for text in TEXTS:
        assert "".join(words(pre, text.encode("ascii", "replace").decode())) != "" or not text
        tokenizer = _gguf_tokenizer._byte_level(vocabulary(pre=pre))
        spans = [span for _, span in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])] if spans else not text


def test_byte_level_bpe_from_its_parts():
    tokens = ["<|end|>", "<tool>", "h", "i", "hi", "Ġ", "Ġhi", "1", "11"]
    kinds = [CONTROL, USER_DEFINED, *[1] * 7]
    merges = ["h i", "Ġ hi", "1 1"]
    made = dict(tokens=tokens, types=kinds, merges=merges, special=dict(eos=0, pad=0), chat_template="{{ 1 }}")
    tokenizer = _gguf_tokenizer.assemble(vocabulary(**made))
    assert tokenizer("hi hi11<tool><|end|>").input_ids == [4, 6, 8, 1, 0]
    assert tokenizer.decode([4, 6, 8, 0], skip_special_tokens=True) == "hi hi11"
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|end|>", "<|end|>", None)
    assert tokenizer.chat_template == "{{ 1 }}"
    assert _gguf_tokenizer.assemble(vocabulary(**made, pre="smollm"))("11").input_ids == [7, 7]


def test_llama_3_takes_whole_words_without_merges():
    made = dict(tokens=["a", "b", "ab"], types=[1, 1, 1])
    assert _gguf_tokenizer.assemble(vocabulary(**made, pre="llama-bpe"))("ab").input_ids == [2]
    assert _gguf_tokenizer.assemble(vocabulary(**made, pre="gpt-2"))("ab").input_ids == [0, 1]


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        (dict(model="gpt2", pre="chatglm-bpe"), "pre-tokenizer 'chatglm-bpe' is not supported; supported are default, gpt-2"),
        (dict(model="bert"), "tokenizer model 'bert' is not supported; supported are gpt2"),
        (dict(), "tokenizer model None is not supported"),
    ],
)
def test_unknown_tokenizers_are_refused_by_name(tmp_path, metadata, match):
    import gguf

    out = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in metadata.items():
        out.add_string(f"tokenizer.ggml.{key}", value)
    out.add_token_list(["a", "b"])
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    with pytest.raises(ValueError, match=match):
        models.load_tokenizer(tmp_path / "m.gguf")


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json and no tokenizer.model"):
        models.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff\xff")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        models.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        models.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer"):
        models.load_tokenizer(tmp_path)


@pytest.mark.real
def test_smollm2_equals_transformers(smollm2):
    """Except where a digit follows spaces: SmolLM2 splits digits off first, which transformers' converter does not know."""
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    ours = models.load_tokenizer("smollm2")
    chat = "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>tail"
    for text in (*TEXTS, chat):
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == text
    assert ours.chat_template == theirs.chat_template
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)
    assert ours.convert_ids_to_tokens(ours("x  1").input_ids) == ["x", "ĠĠ", "1"]


def test_torch_stays_out(pieces):
    import subprocess
    import sys

    script = (
        f"import sys; from jaxprune import models; models.load_tokenizer({str(pieces)!r}); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
