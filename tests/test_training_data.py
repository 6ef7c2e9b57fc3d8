import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jaxprune import data

RECORDS = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}! é漢"} for n in ("one", "two", "three", "four", "five")]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bos"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    """Byte-level, so that decoding gives back the text; with a merge across the end of the prompt."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, ":o"])}, [(":", "o")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    if request.param:
        single = [("<s>", core.token_to_id("<s>"))]
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=single)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def alpaca(tmp_path) -> str:
    (tmp_path / "alpaca.json").write_text(json.dumps(RECORDS))
    return str(tmp_path / "alpaca.json")


def make(source, tokenizer, *, length=512, batch_size=2, seed=0):
    return data.training_batches(str(source), tokenizer, length=length, batch_size=batch_size, seed=seed)


def epoch(batch, examples, size=1):
    return np.concatenate([batch(step)["tokens"] for step in range(examples // size)])


def test_the_loss_is_on_the_response_and_the_end(alpaca, tokenizer):
    got = make(alpaca, tokenizer)
    assert (got.kind, got.examples, got.dropped) == ("instruction", 5, 0)
    batch = got.batch(0)
    assert batch["tokens"].dtype == np.int32 and batch["weights"].dtype == np.float32
    texts = {r["output"]: r for r in RECORDS}
    for tokens, weights in zip(batch["tokens"], batch["weights"], strict=True):
        first = int(np.argmax(weights > 0))
        n = int(weights.sum())
        assert (weights[first : first + n] == 1).all()
        response = tokenizer.decode(tokens[first : first + n])
        before = tokenizer.decode(tokens[:first])
        # One token holds the colon of the prompt and the first letter of "one": it reaches into the response.
        record = texts[response.removeprefix(":").removesuffix("</s>")]
        whole = data.prompt(record["instruction"]) + record["output"]
        assert before.removeprefix("<s>") + response == whole + "</s>"
        assert before.startswith("<s>") == (tokenizer("")["input_ids"] != [])


def test_the_prompt_with_an_input(tmp_path, tokenizer):
    record = dict(instruction="Add.", input="1 and 2", output="3")
    (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n")
    tokens = make(tmp_path / "x.jsonl", tokenizer, batch_size=1).batch(0)["tokens"][0]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:3"
    )


def test_every_epoch_shows_each_example_once_in_another_order(alpaca, tokenizer):
    batch = make(alpaca, tokenizer, batch_size=1).batch
    rows = [batch(step)["tokens"][0].tobytes() for step in range(15)]
    epochs = [rows[i : i + 5] for i in (0, 5, 10)]
    assert all(set(e) == set(epochs[0]) and len(set(e)) == 5 for e in epochs)
    assert epochs[0] != epochs[1] or epochs[1] != epochs[2]


def test_batches_are_the_same_stream_whatever_their_size_and_need_no_state(alpaca, tokenizer):
    singles = epoch(make(alpaca, tokenizer, batch_size=1).batch, 10)
    pairs = epoch(make(alpaca, tokenizer, batch_size=2).batch, 10, 2)
    np.testing.assert_array_equal(singles, pairs)
    big = make(alpaca, tokenizer, batch_size=10).batch
    np.testing.assert_array_equal(big(0)["tokens"], singles)
    later = make(alpaca, tokenizer, batch_size=2).batch(3)
    np.testing.assert_array_equal(later["tokens"], singles[6:8])
    other = make(alpaca, tokenizer, batch_size=10, seed=1).batch(0)
    assert (other["tokens"] != singles).any()


def test_long_examples_are_cut_and_prompts_that_fill_the_length_left_out(tmp_path, tokenizer):
    records = [dict(instruction="x" * 300, output="never"), dict(instruction="Count.", output="y" * 300)]
    (tmp_path / "x.json").write_text(json.dumps(records))
    got = make(tmp_path / "x.json", tokenizer, length=256)
    assert (got.examples, got.dropped) == (1, 1)
    batch = got.batch(0)
    assert batch["tokens"].shape == (2, 256) and batch["weights"][:, -1].all()
    with pytest.raises(ValueError, match="all 2 prompts have 64 tokens or more; raise length"):
        make(tmp_path / "x.json", tokenizer, length=64)


def test_text_is_cut_into_blocks(tmp_path, tokenizer):
    text = "".join(chr(33 + i % 90) for i in range(1000))
    (tmp_path / "x.txt").write_text(text)
    got = make(tmp_path / "x.txt", tokenizer, length=64, batch_size=5)
    assert (got.kind, got.examples) == ("text", 15)
    rows = epoch(got.batch, 15, 5)
    assert {tokenizer.decode(r) for r in rows} == {text[i : i + 64] for i in range(0, 960, 64)}
    assert (got.batch(0)["weights"] == 1).all()
    again = data.text_batches(str(tmp_path / "x.txt"), tokenizer, length=64, batch_size=5, seed=0)
    np.testing.assert_array_equal(again(7)["tokens"], got.batch(7)["tokens"])
    with pytest.raises(ValueError, match="has 1000 tokens; 1001 were asked for; lower length"):
        make(tmp_path / "x.txt", tokenizer, length=1001)


def test_the_kind_follows_the_fields(tmp_path, tokenizer, alpaca):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    assert make(tmp_path / "x.jsonl", tokenizer).kind == "instruction"
    assert make(f"{tmp_path / 'x.jsonl'}:output", tokenizer, length=8).kind == "text"
    batches = data.instruction_batches(alpaca, tokenizer, length=512, batch_size=2, seed=0)
    np.testing.assert_array_equal(batches(1)["tokens"], make(alpaca, tokenizer).batch(1)["tokens"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", '[{"instruction": "a", "output": "b"}, {"instruction": "a"}]', "record 2: no field 'output'"),
        ("x.json", '[{"text": "a"}]', "record 1: no field 'instruction'"),
        ("x.json", '[{"instruction": "a", "input": 3, "output": "b"}]', "record 1: field 'input' is a int"),
        ("x.json", '{"instruction": "a"}', "the top of the file is a dict; a list of objects is needed"),
        ("x.json", '[{"instruction": "a"\n', "line 2: not JSON"),
        ("x.json", "[]", "there are no records in it"),
        ("x.jsonl", '{"text": "a"}\n', "which field holds the text"),
    ],
)
def test_bad_files_are_named(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        make(tmp_path / name, tokenizer)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_without_an_end_token(alpaca, tokenizer):
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no end-of-text token"):
        make(alpaca, endless)
