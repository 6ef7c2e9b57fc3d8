"""Flags that say how to compute: they reach what is compiled, change no result, and are gone afterwards."""

import dataclasses
import json

import chex
import jax
import pytest

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 40


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@dataclasses.dataclass
class Flags:
    """Flags of a command with the part that `using` reads."""

    compute: object


def test_a_model_pruned_with_other_kernels_and_policies_is_the_same(jaxprune, dense, text, tmp_path):
    from jaxprune import models

    flags = ("--method", "taylor", "--ratio", 0.3, "--samples", 2, "--length", 16, "--calibration", text)
    other = ("--attention", "xla", "--remat", "dots_saveable", "--matmul-precision", "highest")
    for name, more in dict(plain=(), other=other).items():
        done = jaxprune("prune", dense, "--out", tmp_path / name, *flags, *more)
        assert done.status == 0, done.err
    chex.assert_trees_all_equal(models.load(tmp_path / "plain"), models.load(tmp_path / "other"))


def test_precision_is_set_while_a_command_runs():
    from jaxprune.commands._compute import Compute, using

    def program():
        x = jax.ShapeDtypeStruct((2, 2), "float32")
        return jax.jit(lambda x: x @ x).lower(x).as_text()

    with using(Flags(Compute(matmul_precision="highest"))):
        assert "HIGHEST" in program()
    assert "HIGHEST" not in program()


@pytest.fixture
def quick_programs_too():
    """Programs are kept however little time they took to compile."""
    before = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.mark.usefixtures("quick_programs_too")
def test_programs_are_kept_where_asked_and_only_there(jaxprune, dense, text, tmp_path):
    before = jax.config.values["jax_compilation_cache_dir"]
    cache, window = tmp_path / "cache", 48  # programs of a length that no other test uses

    def perplexity(*more):
        done = jaxprune("evaluate", dense, "--text", text, "--window", window, "--json", tmp_path / "found.json", *more)
        assert done.status == 0, done.err
        return json.loads((tmp_path / "found.json").read_text())["perplexity"]

    jax.clear_caches()
    first = perplexity("--compilation-cache", cache)
    kept = {path: path.stat().st_mtime_ns for path in cache.iterdir() if path.name.endswith("-cache")}
    assert any("token_losses" in path.name for path in kept)
    jax.clear_caches()
    assert perplexity("--compilation-cache", cache) == first
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir() if path.name.endswith("-cache")} == kept
    assert jax.config.values["jax_compilation_cache_dir"] == before


def test_what_cannot_be_is_refused_before_anything_is_done(refused, dense, text, tmp_path):
    prune = ("prune", dense, "--out", tmp_path / "out", "--calibration", text)
    assert "needs a TPU; here is a CPU: use blocks, xla" in refused(*prune, "--attention", "splash")
    assert "needs a GPU" in refused("evaluate", dense, "--attention", "cudnn")
    assert "give --dtype bfloat16" in refused(*prune, "--attention", "cudnn", "--dtype", "float32")
    assert "differentiates forwards" in refused(*prune, "--attention", "splash", "--method", "curvature")
    assert "which is a file; name a folder" in refused(*prune, "--compilation-cache", text)
