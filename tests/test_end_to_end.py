"""SmolLM2-135M through the command line: pruned, proved, measured, loaded again and handed to transformers."""

import json
import os
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.real
GIB = 2**30
RUN = """
import pathlib, sys
from jaxprune import cli
from jaxprune.commands._common import peak_memory
try: cli.main(sys.argv[2:])
finally: pathlib.Path(sys.argv[1]).write_text(str(peak_memory()))
"""  # what the system tells the parent would count the parent's memory, too
SMALL = ("--ratio", "0.2", "--method", "taylor", "--samples", "4", "--length", "64")


@pytest.fixture(scope="module")
def jaxprune():
    """Runs a command in a process of its own and returns the most memory that it took, in bytes."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # without the virtual devices

    def run(*words):
        with tempfile.NamedTemporaryFile("r") as peak:
            command = [sys.executable, "-c", RUN, peak.name, *map(str, words)]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            assert done.returncode == 0, done.stdout
            return int(peak.read())

    return run


@pytest.fixture(scope="module")
def made(smollm2, jaxprune, tmp_path_factory):
    """Folders pruned by Taylor scores and at random, and the memory that pruning took."""
    root = tmp_path_factory.mktemp("made")
    memory = jaxprune("prune", smollm2, "--out", root / "taylor", *SMALL)
    jaxprune("prune", smollm2, "--out", root / "random", "--ratio", "0.2", "--method", "random")
    return root, memory


def test_pruning_stays_under_two_gibibytes(made, smollm2, jaxprune, tmp_path):
    setting = ("--method", "taylor", "--ratio", "0.2", "--protect-first", "4", "--protect-last", "2")  # LLM-Pruner's
    assert jaxprune("prune", smollm2, "--out", tmp_path / "out", *setting) < 2 * GIB
    assert made[1] < 2 * GIB


def test_the_cut_is_exact_after_a_round_trip_to_disk(made, smollm2, jaxprune, tmp_path):
    jaxprune("verify", smollm2, made[0] / "taylor", "--json", tmp_path / "verify.json")
    result = json.loads((tmp_path / "verify.json").read_text())
    assert result["exact"] and result["tensors updated"] == 0
    assert result["largest logit difference"] < 1e-4 * result["largest logit"]


def test_transformers_loads_what_is_uniform(made):
    """Local ranking without protected layers gives every layer the same widths, which a plain `config.json` can say."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from jaxprune import models

    folder = made[0] / "taylor"
    params, cfg = models.load(folder)
    assert len(set(cfg.layers)) == 1
    tokens = np.asarray(AutoTokenizer.from_pretrained(folder)("The capital of France is")["input_ids"], np.int32)[None]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        want = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(models.apply(params, jnp.asarray(tokens), cfg), want, atol=1e-3)


def test_the_default_recipe_is_exact_beats_taylor_and_runs_in_transformers(made, smollm2, jaxprune, tmp_path):
    """One test, for pruning takes most of its time. Layers differ, so transformers runs them only if it may run their code."""
    import torch
    from transformers import AutoModelForCausalLM

    from jaxprune import data, evaluate, models

    def perplexity(source):
        params, cfg = models.load(source)
        text = "\n\n".join(data.read_text("builtin-heldout").pieces)
        tokens = evaluate.encode_text(models.load_tokenizer(source), text)[:1024]
        return evaluate.perplexity(params, cfg, tokens, window=512)["perplexity"], cfg.decoder_parameters

    folder = tmp_path / "default"
    jaxprune("prune", smollm2, "--out", folder, "--ratio", "0.2", "--samples", "8", "--length", "256")
    jaxprune("verify", smollm2, folder)
    dense, size = perplexity(smollm2)
    taylor, small = perplexity(made[0] / "taylor")
    random, _ = perplexity(made[0] / "random")
    ours, reconstructed = perplexity(folder)
    assert all(abs(1 - parameters / size - 0.2) < 0.005 for parameters in (small, reconstructed))
    assert dense < ours < taylor < random

    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    # in float64, for in float32 this model's logits are rounded by up to 0.006, in either program
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).double().eval()
    params, cfg = models.load(folder)
    tokens = np.arange(24)[None]
    with torch.no_grad():
        logits = theirs(torch.from_numpy(tokens)).logits.numpy()
    with jax.enable_x64():
        want = models.apply(jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), params), jnp.asarray(tokens), cfg)
        assert want.dtype == np.float64
    assert len(set(cfg.layers)) > 1
    np.testing.assert_allclose(logits, want, rtol=1e-3, atol=1e-3)
