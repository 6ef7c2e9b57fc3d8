"""What lm-evaluation-harness gets from our models: direct computations, its own model `hf`, and its own command."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jaxprune import cli, evaluate, folder, harness, models
from jaxprune._continuations import continuations
from jaxprune.models import decode

MAX_LENGTH = 48
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "s"), ("Ġ", "is"), ("a", "n")]
LONG = " ".join(["is the cat in the house an animal that is red ?"] * 3)
PAIRS = [
    ("the cat", " is"),
    ("the cat", " is red"),
    ("the cat ", "is red"),  # the space goes to the continuation
    ("the cat is", "t"),
    ("the c", "an"),
    ("", "the cat"),  # the BOS stands for the context
    (" ", "the"),
    ("<s>the", " cat"),  # no second BOS
    (LONG, " is red"),  # loses its beginning
    ("a", LONG[:40]),
]
TEXTS = ["", "a", "the cat is red", LONG]
PROMPTS = ["the", "is the cat an animal ?", "<s>a", LONG, "red"]


def tokenizer(bos: bool):
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    core = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, MERGES))
    core.add_special_tokens(["<s>", "</s>"])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def write(path: Path, bos: bool) -> Path:
    words = tokenizer(bos)
    cfg = models.LlamaConfig(
        vocab=len(words), d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 2, max_positions=MAX_LENGTH, eos_ids=(1,)
    )
    random = np.random.default_rng(2)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.3 * random.normal(size=x.shape), x.dtype), models.init(jax.random.key(0), cfg)
    )
    models.save(path, params, cfg, words)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[bool, Path]:
    """A random model of bytes and a few merges, with a tokenizer that puts a BOS in front of each text and without."""
    return {bos: write(tmp_path_factory.mktemp("models") / str(bos), bos) for bos in (True, False)}


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no bos"])
def place(folders, request) -> Path:
    return folders[request.param]


def asked(*arguments):
    from lm_eval.api.instance import Instance

    return [
        Instance("", {}, argument if isinstance(argument, tuple) else (argument,), i) for i, argument in enumerate(arguments)
    ]


def ours(place, **options):
    return harness.model_class()(pretrained=place, **options)


def token_log_likelihoods(place, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The log-probability of tokens 1, 2, ..., and whether each is the most likely one: one text, without padding."""
    model = folder.load(str(place))
    logits = jax.jit(models.apply, static_argnames="cfg")(model.params, jnp.asarray([tokens[:-1]]), model.cfg)[0]
    found = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(tokens[1:])[:, None], 1)[:, 0]
    return found, np.asarray(logits.argmax(-1) == np.asarray(tokens[1:]))


def test_log_likelihoods_are_those_of_apply(place):
    words, bos = folder.load(str(place)).tokenizer, place.name == "True"
    encode = lambda text: words.encode(text, add_special_tokens=False)  # noqa: E731
    first = [0] if bos else []
    cases = {
        ("the cat", " is"): (first + encode("the cat"), encode(" is")),
        ("the cat ", "is red"): (first + encode("the cat"), encode(" is red")),
        ("", "the cat"): ([0], encode("the cat")),
        ("<s>the", " cat"): ([0] + encode("the"), encode(" cat")),
        (LONG, " is red"): (first + encode(LONG), encode(" is red")),
    }
    found = ours(place).loglikelihood(asked(*cases))
    for (score, greedy), (context, continuation) in zip(found, cases.values(), strict=True):
        values, best = token_log_likelihoods(place, (context + continuation)[-MAX_LENGTH - 1 :])
        n = len(continuation)
        assert score == pytest.approx(values[-n:].sum(), rel=1e-5)
        assert greedy == best[-n:].all()


def test_the_greedy_continuation_is_said_to_be_greedy(place):
    lm = ours(place)
    model = lm.model
    tokens = decode.generate(model.params, model.cfg, np.asarray([lm.tok_encode("the cat")]), max_new_tokens=3)[0].tolist()
    pairs = [(None, lm.tok_encode("the cat"), tokens), (None, lm.tok_encode("the cat"), [*tokens[:2], (tokens[2] + 1) % 60])]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(pairs)] == [True, False]


def test_rolling_is_the_sum_of_the_losses_of_perplexity(place):
    lm = ours(place)
    text = "the cat is red"
    tokens = np.asarray([lm.prefix_token_id, *lm.tok_encode(text)], np.int32)
    found = evaluate.perplexity(lm.model.params, lm.model.cfg, tokens, window=len(tokens))
    (score,) = lm.loglikelihood_rolling(asked(text))
    assert score == pytest.approx(-np.log(found["perplexity"]) * (len(tokens) - 1), rel=1e-5)


def test_rolling_predicts_each_token_of_a_long_text_once(place):
    lm = ours(place)
    tokens = lm.tok_encode(LONG)
    first, rest = tokens[:MAX_LENGTH], tokens[MAX_LENGTH:]
    assert MAX_LENGTH < len(rest) < 2 * MAX_LENGTH
    total = token_log_likelihoods(place, [lm.prefix_token_id, *first])[0].sum()
    total += token_log_likelihoods(place, tokens[MAX_LENGTH - 1 : 2 * MAX_LENGTH])[0].sum()
    total += token_log_likelihoods(place, tokens[-MAX_LENGTH - 1 :])[0][MAX_LENGTH - len(rest) :].sum()
    assert lm.loglikelihood_rolling(asked(LONG)) == [pytest.approx(total, rel=1e-5)]


@pytest.mark.filterwarnings("ignore")  # of torch and accelerate
def test_all_three_equal_the_model_hf_of_lm_eval(place):
    from lm_eval.models.huggingface import HFLM

    # Their cache gives one text with two contexts, '' + 'the cat' and '<s>the' + ' cat', the logits of the wrong tokens.
    theirs = HFLM(pretrained=str(place), device="cpu", dtype="float32", batch_size=1, logits_cache=False)
    mine = ours(place, batch_size=3)
    assert (mine.max_length, mine.prefix_token_id, mine.eot_token_id) == (
        theirs.max_length, theirs.prefix_token_id, theirs.eot_token_id,
    )  # fmt: skip
    pairs = [pair for pair in PAIRS if pair[0] != " " or place.name == "True"]  # without a BOS, theirs refuses a blank context
    expected, found = theirs.loglikelihood(asked(*pairs), disable_tqdm=True), mine.loglikelihood(asked(*pairs))
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in expected], rtol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    np.testing.assert_allclose(
        mine.loglikelihood_rolling(asked(*TEXTS)), theirs.loglikelihood_rolling(asked(*TEXTS)), rtol=1e-4
    )
    prompts = [(prompt, options) for prompt in PROMPTS for options in (dict(until=[], max_gen_toks=9), dict(until=["e", "a"]))]
    prompts = [(prompt, dict(max_gen_toks=6, do_sample=False) | options) for prompt, options in prompts]
    assert mine.generate_until(asked(*prompts)) == theirs.generate_until(asked(*prompts), disable_tqdm=True)


def test_generation_is_that_of_decode_and_stops_at_texts_and_tokens(place):
    lm = ours(place)
    model, prompt = lm.model, lm.tok_encode("the cat")
    tokens = decode.generate(model.params, model.cfg, np.asarray([prompt]), max_new_tokens=12, eos_ids=(1,))[0].tolist()
    whole = lm.tokenizer.decode(tokens, skip_special_tokens=True)
    assert lm.generate_until(asked(("the cat", dict(until=[], max_gen_toks=12)))) == [whole]
    stop = whole[5:7]
    for until in (stop, [stop], ["nowhere", stop]):
        assert lm.generate_until(asked(("the cat", dict(until=until, max_gen_toks=12)))) == [whole.split(stop)[0]]
    options = dict(until=(), max_new_tokens=12, max_length=MAX_LENGTH)
    ((_, text),) = continuations(model.params, model.cfg, lm.tokenizer, [prompt], eos_ids=(tokens[4],), **options)
    assert text == lm.tokenizer.decode(tokens[: tokens.index(tokens[4])])


def test_sampling_is_repeatable_and_differs_from_greedy(place):
    request = asked(("the cat", dict(do_sample=True, temperature=2.0, max_gen_toks=12)))
    greedy = asked(("the cat", dict(do_sample=False, temperature=2.0, max_gen_toks=12)))
    lm = ours(place)
    assert lm.generate_until(request) == lm.generate_until(request) != lm.generate_until(greedy)


@pytest.mark.parametrize("batch_size", [1, 2, "auto"])
def test_batches_do_not_matter(folders, batch_size):
    one, other = ours(folders[True], batch_size=batch_size), ours(folders[True], batch_size=4)
    expected, found = (np.asarray(lm.loglikelihood(asked(*PAIRS)), float) for lm in (one, other))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    prompts = [(prompt, dict(until=["e"], max_gen_toks=7)) for prompt in PROMPTS]
    assert one.generate_until(asked(*prompts)) == other.generate_until(asked(*prompts))


def test_a_bos_can_be_asked_for_and_left_out(folders):
    plain, forced = ours(folders[True], add_bos_token=False), ours(folders[False], add_bos_token=True)
    pairs = [pair for pair in PAIRS if pair[0] != " "]
    for mine, same in ((plain, ours(folders[False])), (forced, ours(folders[True]))):
        found, expected = (np.asarray(lm.loglikelihood(asked(*pairs)), float) for lm in (mine, same))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_finished_requests_are_in_the_cache(folders, tmp_path):
    """`--use_cache` of lm_eval keeps what was done before an interruption."""
    from lm_eval.api.model import CachingLM

    lm = ours(folders[True], batch_size=1)
    cached = CachingLM(lm, str(tmp_path / "cache.db"))
    prompts = [(prompt, dict(until=["e"], max_gen_toks=5)) for prompt in PROMPTS]

    def answers():
        texts = cached.loglikelihood(asked(*PAIRS)), cached.loglikelihood_rolling(asked(*TEXTS))
        return *texts, cached.generate_until(asked(*prompts))

    first = answers()
    lm.model = None  # from here on nothing can be computed
    assert answers() == first


WITHOUT_TORCH = """
import runpy, sys
from importlib.machinery import PathFinder

class Others(PathFinder):
    @classmethod
    def find_spec(cls, name, *options):
        return None if name.split(".")[0] == "torch" else super().find_spec(name, *options)

sys.meta_path[sys.meta_path.index(PathFinder)] = Others

import lm_eval.tasks  # reading the 14,000 files of its own tasks takes seconds

whole = lm_eval.tasks.TaskManager
lm_eval.tasks.TaskManager = lambda **options: whole(include_defaults=False, **options)
runpy.run_module("jaxprune.lm_eval", run_name="__main__", alter_sys=True)
"""
QUESTIONS = [
    dict(query="is the cat red ?", choices=["yes", "no", "an animal"], gold=0),
    dict(query="what is the house ?", choices=["red", "the cat"], gold=1),
    dict(query="is an animal in the house ?", choices=["is", "an", "the", "no"], gold=2),
    dict(query="what ?", choices=["the", "the house is red"], gold=1),
    dict(query="the cat ?", choices=["is", "red"], gold=0),
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with a task of each kind on a file of JSON lines."""
    place = tmp_path_factory.mktemp("tasks")
    (place / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    common = dict(
        dataset_path="json",
        dataset_kwargs=dict(data_files=dict(test=str(place / "questions.jsonl")), cache_dir=str(place / "cache")),
        test_split="test",
        fewshot_split="test",
    )
    mean = dict(aggregation="mean", higher_is_better=True)
    kinds = dict(
        tiny_choice=dict(
            output_type="multiple_choice", doc_to_text="{{query}}\nAnswer:", doc_to_target="gold", doc_to_choice="choices",
            metric_list=[dict(metric="acc", **mean), dict(metric="acc_norm", **mean)],
        ),
        tiny_rolling=dict(
            output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{query}}",
            metric_list=[dict(metric="word_perplexity")],
        ),
        tiny_writing=dict(
            output_type="generate_until", doc_to_text="{{query}}", doc_to_target="{{choices[gold]}}",
            generation_kwargs=dict(until=["e"], max_gen_toks=5), metric_list=[dict(metric="exact_match", **mean)],
        ),
    )  # fmt: skip
    for name, kind in kinds.items():
        (place / f"{name}.yaml").write_text(yaml.safe_dump(dict(task=name, **common, **kind)))
    return place


@pytest.fixture
def few_tasks(monkeypatch):
    """lm_eval without tasks of its own."""
    import lm_eval.tasks

    whole = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda include_path: whole(include_path=include_path, include_defaults=False)
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_our_command_equals_that_of_lm_eval_which_needs_no_torch(folders, tasks, few_tasks, tmp_path, capsys):
    names = "tiny_choice,tiny_rolling,tiny_writing"
    command = [
        sys.executable, "-c", WITHOUT_TORCH, "--model", "jaxprune", "--tasks", names, "--include_path", str(tasks),
        "--limit", "4", "--num_fewshot", "1", "--model_args", f"pretrained={folders[True]},dtype=float32,batch_size=auto",
        "--output_path", str(tmp_path / "out.json"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(harness.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("out*.json")
    theirs = json.loads(written.read_text())["results"]

    flags = ["--tasks", names, "--include-path", str(tasks), "--limit", "4", "--num-fewshot", "1"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", str(folders[True]), *flags, "--json", str(tmp_path / "ours.json")])
    assert ended.value.code == 0
    result = json.loads((tmp_path / "ours.json").read_text())
    assert {row["task"]: row["items"] for row in result["tasks"]} == dict.fromkeys(names.split(","), 4)
    assert result["parameters"] > 0
    for row in result["tasks"]:
        assert row["value"] == pytest.approx(theirs[row["task"]][f"{row['metric']},none"], rel=1e-6)
        error = theirs[row["task"]][f"{row['metric']}_stderr,none"]
        assert row["stderr"] == (pytest.approx(error, rel=1e-6) if isinstance(error, float) else None)
    assert {(row["task"], row["metric"]) for row in result["tasks"]} >= {("tiny_choice", "acc"), ("tiny_choice", "acc_norm")}
    assert "tiny_choice" in capsys.readouterr().out


def test_multiple_choice_is_that_of_the_flag_choice(folders, tasks, few_tasks):
    model = folder.load(str(folders[False]))
    rows = harness.run_tasks(model, harness.load_tasks(["tiny_choice"], tasks))
    direct = evaluate.multiple_choice(
        model.params, model.cfg, model.tokenizer, evaluate.load_choices(tasks / "questions.jsonl")
    )
    assert {row["metric"]: row["value"] for row in rows} == dict(acc=direct["accuracy"], acc_norm=direct["accuracy_normalised"])


def test_the_preset_has_the_metric_of_each_task_and_their_mean(folders, tasks, few_tasks, tmp_path):
    source = yaml.safe_load((tasks / "tiny_choice.yaml").read_text())
    for name in harness.LLM_PRUNER:
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(source | dict(task=name)))
    found = harness.load_tasks(["llm-pruner"], tmp_path)
    *rows, mean = harness.run_tasks(folder.load(str(folders[False])), found, limit=3)
    assert {row["task"]: row["metric"] for row in rows} == harness.LLM_PRUNER
    assert (mean["task"], mean["value"]) == ("llm-pruner", pytest.approx(np.mean([row["value"] for row in rows])))


def test_data_that_cannot_be_reached_is_said_in_a_line(few_tasks, tasks, tmp_path, monkeypatch):
    import datasets

    def refuse(*_, **__):
        raise ConnectionError("Couldn't reach 'somewhere' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        ValueError, match="tiny_choice cannot be loaded .*Couldn't reach .* check the network, or give tasks on files"
    ):
        harness.load_tasks(["tiny_choice"], tasks)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tasks", "tiny_nothing"), "tasks: 'tiny_nothing' given; allowed are llm-pruner"),
        (("--tasks", ""), "tasks: '' given"),
        (("--tasks", "a", "--limit", "0"), "limit: 0 given; it must be at least 1"),
        (("--tasks", "a", "--num-fewshot", "-1"), "num_fewshot: -1 given"),
        (("--tasks", "a", "--include-path", "nowhere"), "include_path: nowhere given; name a folder"),
        (("--num-fewshot", "1"), "name some with --tasks"),
    ],
)
def test_flags_that_cannot_be_used(flags, message, few_tasks, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", "no-such-model", *flags])
    line = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2
    assert line.startswith("jaxprune: error: ") and message in line


def test_without_lm_eval_a_line_says_what_to_install(monkeypatch, capsys):
    from jaxprune import lm_eval as command

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for run in (lambda: cli.main(["evaluate", "no-such-model", "--tasks", "piqa"]), command.main):
        with pytest.raises(SystemExit) as ended:
            run()
        assert ended.value.code == 2
        assert capsys.readouterr().err.endswith("lm_eval: is not installed, and tasks need it; pip install 'jaxprune[eval]'\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch_size=0), "batch_size: 0 given"),
        (dict(batch_size="many"), "batch_size: 'many' given"),
        (dict(max_length=0), "max_length: 0 given"),
        (dict(dtype="float8"), "dtype: 'float8' given"),
    ],
)
def test_model_arguments_that_cannot_be_used(folders, options, message):
    with pytest.raises(ValueError, match=message):
        ours(folders[True], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_beams=4), "num_beams=4 given; allowed are until"),
        (dict(do_sample=True, temperature=1.0, top_p=0.9), "top_p=0.9 given"),
        (dict(max_gen_toks=MAX_LENGTH), f"max_new_tokens: {MAX_LENGTH} given, the model has room for {MAX_LENGTH}"),
    ],
)
def test_generation_that_is_not_there(folders, options, message):
    with pytest.raises(ValueError, match=message):
        ours(folders[True]).generate_until(asked(("the", options)))


def test_texts_that_do_not_fit_are_refused(folders):
    lm = ours(folders[True])
    with pytest.raises(ValueError, match="the model reads 48; raise max_length"):
        lm.loglikelihood(asked(("the", LONG)))
    with pytest.raises(ValueError, match="continuation of 0 tokens"):
        lm._loglikelihood_tokens([(None, [1], [])])
    with pytest.raises(ValueError, match="token ids 1 to 999 given"):
        lm._loglikelihood_tokens([(None, [1], [999])])
