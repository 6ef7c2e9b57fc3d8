"""`--mesh` on the command line: the same folders and numbers as on one device."""

import functools
import json
import re
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from jaxprune.commands import _devices, prune

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 40
FLAGS = ("--method", "taylor", "--ratio", 0.3, "--samples", 4, "--length", 16, "--kv-multiple-of", 2)


def test_prune_recover_and_evaluate_on_a_mesh(jaxprune, dense, tmp_path):
    from jaxprune import models

    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    models_at, numbers = {}, {}
    for name, mesh in dict(one=(), mesh=("--mesh", "data=2,fsdp=2,tensor=2")).items():
        small, better, found = tmp_path / name, tmp_path / f"{name}-better", tmp_path / f"{name}.json"
        done = jaxprune("prune", dense, "--out", small, "--calibration", text, *FLAGS, *mesh)
        assert done.status == 0, done.err
        training = ("--data", text, "--steps", 2, "--batch-size", 4, "--length", 16)
        assert jaxprune("recover", small, "--out", better, *training, *mesh).status == 0
        assert jaxprune("evaluate", better, "--text", text, "--window", 16, "--json", found, *mesh).status == 0
        models_at[name], numbers[name] = models.load(small), json.loads(found.read_text())
    assert models_at["mesh"][1] == models_at["one"][1]
    chex.assert_trees_all_equal(models_at["mesh"][0], models_at["one"][0])  # cut from the same weights by the same plan
    np.testing.assert_allclose(numbers["mesh"]["perplexity"], numbers["one"]["perplexity"], rtol=1e-4)


@pytest.mark.parametrize(
    ("flags", "mesh", "found"),
    [
        ({}, "tensor=4", (8, 4)),
        ({}, "fsdp=4,tensor=16", (16, 16)),
        (dict(kv_multiple_of=1), "tensor=4", (8, 1)),
        (dict(units="hidden"), "fsdp=16,tensor=32", (16, 32)),
        ({}, None, (8, 1)),
    ],
)
def test_widths_are_multiples_of_the_tensor_axis(flags, mesh, found):
    method = dict(method="taylor") if "units" in flags else {}
    args = prune.Prune(
        model="model", out=Path("out"), shape=prune.Shape(**flags), devices=_devices.Devices(mesh=mesh), **method
    )
    assert (args.settings().multiple_of, args.settings().kv_multiple_of) == found


def test_meshes_that_cannot_be_are_refused_before_anything_is_done(refused, dense, tmp_path):
    words = ("prune", dense, "--out", tmp_path / "out", *FLAGS)
    assert "takes 64 devices; there are 8" in refused(*words, "--mesh", "data=64")
    assert "name data, fsdp, tensor once each" in refused(*words, "--mesh", "8")
    assert "given without a mesh" in refused(*words, "--strict-sharding")
    assert "do not divide by tensor=4" in refused(*words, "--mesh", "tensor=4", "--strict-sharding")
    assert "do not divide by fsdp=3" in refused("evaluate", dense, "--mesh", "fsdp=3", "--strict-sharding")


def test_generate_and_verify(jaxprune, small, model):
    for command in (("generate", small, "--prompt", "once", "--max-new-tokens", 8), ("verify", model, small)):
        one, mesh = (jaxprune(*command, *flags) for flags in ((), ("--mesh", "data=2,fsdp=2,tensor=2")))
        assert one.status == mesh.status == 0, mesh.err
        texts = [re.sub(r".*(seconds|logit|tolerance).*", "", done.out) for done in (one, mesh)]
        texts = [re.sub("-+", "-", text) for text in texts]  # a rule is as long as the numbers that are left out
        assert texts[0] == texts[1]


def test_sparsify(jaxprune, model, tmp_path):
    from jaxprune import models

    found = {}
    for name, mesh in dict(one=(), mesh=("--mesh", "data=2,fsdp=2,tensor=2")).items():
        out = tmp_path / name
        done = jaxprune(
            "sparsify", model, "--out", out, "--nm", "2:4", "--method", "sparsegpt", "--samples", 16, "--length", 16, *mesh
        )
        assert done.status == 0, done.err
        found[name] = models.load(out)[0]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, found["mesh"], found["one"])
    assert (found["mesh"]["run_0"]["down"] == 0).mean() >= 0.5


def test_search(jaxprune, model, tmp_path):
    flags = ("--samples", 4, "--length", 16, "--fitness-samples", 8, "--generations", 1, "--ratio", 0.3, "--kv-multiple-of", 2)
    plans, losses = [], []
    for name, mesh in dict(one=(), mesh=("--mesh", "data=2,fsdp=2,tensor=2")).items():
        out, file = tmp_path / name, tmp_path / f"{name}.json"
        done = jaxprune("search", model, "--out", out, "--json", file, *flags, *mesh)
        assert done.status == 0, done.err
        result = json.loads(file.read_text())
        plans.append((out / "baseline.json").read_text())
        losses.append([result["loss, dense"], result["held-out loss, baseline"], result["held-out loss, search"]])
    assert plans[0] == plans[1]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_run_and_bench(jaxprune, model, tmp_path):
    out, mesh = tmp_path / "run", ("--mesh", "data=2,tensor=2")
    flags = ("--method", "magnitude", "--window", 16, "--max-tokens", 64)
    training = ("--recovery-steps", 1, "--recovery-length", 16, "--learning-rate", 0.001)
    done = jaxprune("run", model, "--out", out, *flags, *training, *mesh)
    assert done.status == 0 and (out / "report.html").is_file(), done.err
    one = tmp_path / "one.json"
    assert jaxprune("evaluate", out / "recovered", "--text", "builtin-heldout", *flags[2:], "--json", one).status == 0
    there = json.loads((out / "evaluate-recovered.json").read_text())
    np.testing.assert_allclose(there["perplexity"], json.loads(one.read_text())["perplexity"], rtol=1e-4)

    done = jaxprune("bench", model, "--out", tmp_path / "bench", "--methods", "magnitude", *flags[2:], "--mesh", "tensor=4")
    assert done.status == 0, done.err
    cell = json.loads((tmp_path / "bench" / "cells" / "magnitude-0.2.json").read_text())
    assert (cell["settings"]["multiple_of"], cell["settings"]["kv_multiple_of"]) == (8, 4)
    assert cell["metrics"]["perplexity"] > 0
