"""Models for other programs on the command line: what fits, what is written, what is refused before any work."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import models
from jaxprune.models import checkpoint, export


def config(folder):
    return checkpoint.read_config(folder)


@pytest.fixture
def uneven(jaxprune, dense, tmp_path):
    """A model whose layers differ."""
    flags = ("--method", "magnitude", "--ratio", 0.2, "--ranking", "global", "--multiple-of", 1, "--protect-first", 1)
    assert jaxprune("prune", dense, "--out", tmp_path / "uneven", *flags).status == 0
    assert len(set(config(tmp_path / "uneven").layers)) == 2
    return tmp_path / "uneven"


def test_check_says_what_fits_and_why_not(jaxprune, dense, uneven, tmp_path):
    fits = {}
    for name, folder in dict(dense=dense, uneven=uneven).items():
        done = jaxprune("export", folder, "--check", "--json", tmp_path / "check.json")
        assert done.status == 0
        result = json.loads((tmp_path / "check.json").read_text())
        rows = {row["profile"]: row for row in result["profiles"]}
        refused = {row["profile"] for row in result["reasons"]}
        assert rows.keys() == export.PROFILES.keys()
        assert all((row["fits"] == "no") == (row["MB"] is None) == (profile in refused) for profile, row in rows.items())
        fits[name] = {profile for profile, row in rows.items() if row["fits"] == "yes"}
    assert fits["dense"] == export.PROFILES.keys()
    assert fits["uneven"] == {"hf-custom", "hf-padded", "gguf"}


@pytest.mark.parametrize("profile", ["hf-custom", "hf-padded", "gguf"])
def test_what_is_written_is_as_large_as_predicted_and_loads_again(jaxprune, uneven, tmp_path, profile):
    path = tmp_path / ("out.gguf" if profile == "gguf" else "out")
    flags = ("--type", "f32") if profile == "gguf" else ()
    done = jaxprune("export", uneven, "--to", profile, "--out", path, *flags, "--json", tmp_path / "out.json")
    assert done.status == 0, done.err
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["bytes of numbers"] < result["bytes on disk"]
    tokens = jnp.arange(24).reshape(2, 12)
    before, after = (np.asarray(models.apply(p, tokens, cfg)) for p, cfg in (models.load(uneven), models.load(path)))
    np.testing.assert_allclose(after, before, atol=1e-5)


def test_an_existing_file_is_replaced_only_if_asked(jaxprune, refused, uneven, tmp_path):
    words = ("export", uneven, "--to", "gguf", "--out", tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_text("old")
    assert "--overwrite" in refused(*words)
    assert jaxprune(*words, "--overwrite").status == 0
    assert (tmp_path / "x.gguf").read_bytes()[:4] == b"GGUF"


def test_what_cannot_be_written_is_refused(refused, uneven, tmp_path):
    out = tmp_path / "out"
    for words, message in [
        (("--to", "hf", "--out", out), "hf: this model does not fit"),
        (("--to", "maxtext", "--out", out), "maxtext: this model does not fit"),
        (("--to", "gguf", "--out", out), "name it out.gguf"),
        (("--to", "gguf", "--out", out.with_suffix(".gguf"), "--type", "bfloat16"), "gguf stores"),
        (("--to", "hf-padded", "--out", out, "--type", "q8_0"), "hf-padded stores"),
        (
            (
                "--to",
                "hf-padded",
            ),
            "--to and --out",
        ),
        ((), "--check"),
        (("--check", "--to", "hf"), "--check writes nothing"),
        (("--check", "--type", "int3"), "int3"),
    ]:
        assert message in refused("export", uneven, *words)
    assert "no such folder" in refused("export", tmp_path / "nothing", "--check")


@pytest.mark.parametrize("method", ["magnitude", "kfac-obs", "flap"])
def test_prune_for_hf_leaves_equal_layers(jaxprune, dense, tmp_path, method):
    flags = ("--method", method, "--ratio", 0.3, "--samples", 2, "--length", 32, "--for", "hf", "--multiple-of", 1)
    done = jaxprune("prune", dense, "--out", tmp_path / "out", *flags)
    assert done.status == 0, done.err
    cfg = config(tmp_path / "out")
    assert len(set(cfg.layers)) == 1 and not export.PROFILES["hf"].problems(cfg)
    assert abs(1 - cfg.decoder_parameters / config(dense).decoder_parameters - 0.3) < 0.03
    assert jaxprune("export", tmp_path / "out", "--to", "hf", "--out", tmp_path / "hf").status == 0


def test_prune_for_gguf_leaves_widths_that_it_can_quantise(jaxprune, dense, tmp_path):
    flags = ("--method", "magnitude", "--ratio", 0.3, "--ranking", "global", "--for", "gguf")
    assert jaxprune("prune", dense, "--out", tmp_path / "out", *flags).status == 0
    assert {dims.ff for dims in config(tmp_path / "out").layers} <= {48, 32}


def test_a_search_for_a_profile_finds_it(jaxprune, dense, tmp_path):
    flags = ("--strategy", "evolution", "--equal-widths", "--generations", 1, "--samples", 2, "--length", 16)
    flags += ("--fitness-samples", 2, "--ratio", 0.3, "--multiple-of", 1)
    done = jaxprune("search", dense, "--out", tmp_path / "found", *flags, "--for", "hf")
    assert done.status == 0, done.err
    plan = tmp_path / "found" / "plan.json"
    assert jaxprune("prune", dense, "--out", tmp_path / "out", "--plan", plan, "--for", "hf").status == 0
    assert not export.PROFILES["hf"].problems(config(tmp_path / "out"))


def test_what_a_profile_cannot_hold_is_refused_before_any_work(refused, jaxprune, uneven, model, tmp_path):
    out = ("--out", tmp_path / "out")
    for words, message in [
        (("prune", model, *out, "--for", "onnx"), "onnx"),
        (("prune", model, *out, "--for", "hf", "--protect-first", 1), "--protect-first"),
        (("prune", model, *out, "--for", "hf", "--max-distinct", 3), "--max-distinct"),
        (("prune", model, *out, "--for", "hf", "--method", "sublayers"), "sublayers may lead"),
        (("prune", model, *out, "--for", "gguf", "--method", "slicegpt"), "rotated may lead"),
        (("search", model, *out, "--for", "hf"), "--equal-widths"),
        (("search", model, *out, "--for", "onnx"), "onnx"),
        (("run", model, *out, "--for", "onnx"), "onnx"),
    ]:
        assert message in refused(*words)
    plan = tmp_path / "uneven" / "jaxprune.json"
    assert "this plan leads" in refused("prune", model, *out, "--plan", plan, "--for", "hf")
