"""`jaxprune run`: all stages, those that are complete only once, and the report."""

import json
import re
import shutil

import pytest

SMALL = (
    *("--ratio", 0.5, "--samples", 2, "--length", 16, "--recovery-steps", 3, "--batch-size", 2, "--recovery-length", 16),
    *("--window", 32, "--max-tokens", 64, "--prompt", "A word", "--distill"),
)
STAGES = [
    "pruning", "recovery", "verification", "evaluation, dense", "sample, dense", "evaluation, pruned", "sample, pruned",
    "evaluation, recovered", "sample, recovered",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(dense, tmp_path_factory):
    """The folder of a complete run."""
    from jaxprune import cli

    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(word) for word in ("run", dense, "--out", out, *SMALL, "--json", out.parent / "result.json")])
    assert stopped.value.code == 0
    return out


def made(done):
    """The stages that a command made, and those that it found."""
    return re.findall(r"^== (.*)$", done.err, re.M), re.findall(r"^(.*): done before$", done.err, re.M)


def test_a_run_leaves_models_numbers_and_a_report(finished):
    result = json.loads((finished.parent / "result.json").read_text())
    assert result["exact"] is True
    rows = {row[""]: row for row in result["metrics"]}
    assert rows["decoder_parameters"]["pruned"] * 2 == rows["decoder_parameters"]["dense"]
    assert rows["perplexity"].keys() == {"", "dense", "pruned", "recovered"}
    assert rows["tokens"]["recovered"] == 64 and rows["window"]["recovered"] == 32
    for name in ("pruned", "recovered"):
        assert (finished / name / "jaxprune.json").is_file() and (finished / name / "tokenizer.json").is_file()
    assert not [path for path in finished.iterdir() if path.name.startswith(".") or path.name.endswith(".training")]


def test_the_report_stands_alone(finished):
    from matplotlib import image

    page = (finished / "report.html").read_text()
    for figure in ("widths", "scores", "before_after", "loss"):
        assert image.imread(finished / f"{figure}.png").std() > 0.01
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", page)
    assert "A word" in page and "divergence from the dense model" in page


def test_a_complete_run_is_not_repeated(finished, dense, jaxprune, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    done = jaxprune("run", dense, "--out", out, *SMALL)
    assert done.status == 0 and made(done) == ([], STAGES)


def test_a_run_that_was_stopped_goes_on_after_its_last_complete_stage(finished, dense, jaxprune, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    for name in ("evaluate-recovered.json", "sample-recovered.json", "verify.json", "report.html", "loss.png"):
        (out / name).unlink()
    kept = (out / "recovered" / "model.safetensors").stat().st_mtime_ns
    done = jaxprune("run", dense, "--out", out, *SMALL)
    again = ["verification", "evaluation, recovered", "sample, recovered"]
    assert done.status == 0 and made(done) == (again, [stage for stage in STAGES if stage not in again])
    assert (out / "recovered" / "model.safetensors").stat().st_mtime_ns == kept
    assert (out / "report.html").is_file() and (out / "loss.png").is_file()


def test_a_stage_that_was_cut_off_is_made_again(finished, dense, jaxprune, tmp_path, monkeypatch):
    from jaxprune import recovery

    out = shutil.copytree(finished, tmp_path / "out")
    (out / "recover.json").unlink()  # killed after the model was written and before its result was
    fit, seen = recovery.fit, []
    monkeypatch.setattr(recovery, "fit", lambda *args, **options: (seen.append(options["resume"]), fit(*args, **options))[1])
    done = jaxprune("run", dense, "--out", out, *SMALL)
    assert done.status == 0 and made(done)[0] == ["recovery"] and seen == [True]
    assert (out / "recovered" / "model.safetensors").read_bytes() == (finished / "recovered" / "model.safetensors").read_bytes()


def test_other_settings_are_another_run(finished, dense, refused, jaxprune, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    line = refused("run", dense, "--out", out, *SMALL, "--seed", 1)
    assert "holds a run with other settings (calibration)" in line
    (out / "run.json").write_text("{")
    assert "run.json: not valid JSON" in refused("run", dense, "--out", out, *SMALL)


def test_a_run_can_begin_anew_without_recovery(finished, dense, jaxprune, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    flags = (*SMALL, "--method", "magnitude", "--units", "hidden", "--data", "none", "--overwrite")
    done = jaxprune("run", dense, "--out", out, *flags)
    assert done.status == 0 and made(done)[0] == [stage for stage in STAGES if "recover" not in stage]
    assert not (out / "recovered").exists() and not (out / "loss.png").exists()
    assert (out / "report.html").is_file() and (out / "scores.png").is_file()
