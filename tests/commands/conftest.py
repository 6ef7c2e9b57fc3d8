"""A tiny random model as a folder, and the command line as a function."""

import re
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import pytest


class Done(NamedTuple):
    """How a command ended: its exit status, and what it wrote to stdout and to stderr."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def dense(tmp_path_factory) -> Path:
    """The folder of a random model with two layers whose tokens are bytes; tests copy it before they damage it."""
    import jax
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    from jaxprune import models

    letters = {c: i for i, c in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>"])}
    core = Tokenizer(BPE(letters, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    layers = (models.LayerDims(2, 2, 48),) * 2
    cfg = models.LlamaConfig(vocab=len(letters), d=32, head_dim=8, layers=layers, eos_ids=(tokenizer.eos_token_id,))
    folder = tmp_path_factory.mktemp("models") / "dense"
    models.save(folder, models.init(jax.random.key(0), cfg), cfg, tokenizer)
    return folder


@pytest.fixture
def jaxprune(capfd):
    """Runs a command in this process: `jaxprune("prune", folder, "--ratio", 0.5)`."""

    def run(*words: object) -> Done:
        from jaxprune import cli

        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(word) for word in words])
        return Done(stopped.value.code, *capfd.readouterr())

    handler = signal.getsignal(signal.SIGINT)  # which a command that Ctrl-C ended no longer listens to
    yield run
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def refused(jaxprune, tmp_path):
    """Runs a command that has to end with one line of error and leave every file as it was; returns that line."""

    def run(*words: object) -> str:
        before = _files(tmp_path)
        done = jaxprune(*words)
        *progress, last = done.err.splitlines()
        assert done.status == 2 and done.out == "", done
        assert last.startswith("jaxprune: error: "), done.err
        assert all(re.search(r" \.\.\.$|^== |, step \d|^text data: |it\]$|it/s\]$", line) for line in progress), done.err
        assert _files(tmp_path) == before
        return last

    return run


@pytest.fixture
def model(dense, tmp_path):
    """A copy of the model to damage."""
    return shutil.copytree(dense, tmp_path / "model")


@pytest.fixture
def small(jaxprune, model, tmp_path):
    """The folder of a pruned model."""
    assert jaxprune("prune", model, "--out", tmp_path / "small", "--method", "magnitude", "--ratio", 0.2).status == 0
    return tmp_path / "small"


def _files(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}
