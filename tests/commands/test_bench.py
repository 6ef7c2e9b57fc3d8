"""`jaxprune bench`: each cell once and in a process of its own, tables and figures of all, failures said."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest

from jaxprune import methods
from jaxprune.commands import _bench_cell
from jaxprune.commands.bench import Bench

SMALL = ("--samples", 2, "--length", 16, "--window", 32, 16, "--max-tokens", 64)
METHODS = "random,taylor,sparse:wanda:2:4"
CELLS = ["dense", "random-0.3", "taylor-0.3", "sparse-wanda-2-4-0.5", "random-0.9", "taylor-0.9"]


@pytest.fixture(scope="module")
def finished(dense, tmp_path_factory):
    """The folder of a complete bench, whose second ratio no method can reach on this model."""
    from jaxprune import cli

    out = tmp_path_factory.mktemp("bench") / "out"
    words = ("bench", dense, "--out", out, "--methods", METHODS, "--ratios", 0.3, 0.9, *SMALL)
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(word) for word in words])
    assert stopped.value.code == 0
    return out


@pytest.fixture
def bench(jaxprune, dense):
    return lambda out, *words: jaxprune("bench", dense, "--out", out, *SMALL, *words)


def test_every_cell_is_measured(finished):
    assert {path.stem for path in (finished / "cells").iterdir()} == set(CELLS)
    cells = json.loads((finished / "bench.json").read_text())["cells"]
    assert list(cells) == CELLS
    dense, small = cells["dense"], cells["taylor-0.3"]
    assert small["calibration"] == small["calibration"] | dict(source="builtin", samples=2, length=16)
    assert small["seconds"] > 0 and small["peak_memory"] > 2**26 and "seconds" not in dense
    kept = small["metrics"]["decoder_parameters"] / dense["metrics"]["decoder_parameters"]
    assert small["fraction_removed"] == pytest.approx(1 - kept) == pytest.approx(0.3, abs=0.005)
    for cell in (dense, small):
        assert {"perplexity", "perplexity_at_16", "decode_tokens_per_second"} <= cell["metrics"].keys()
    sparse = cells["sparse-wanda-2-4-0.5"]
    assert sparse["fraction_removed"] == 0.5 and 0 < sparse["relative_error"] < 14  # of two layers' matrices
    assert sparse["metrics"]["decoder_parameters"] == dense["metrics"]["decoder_parameters"]
    assert "at most 70.0% can go" in cells["random-0.9"]["failed"] and "metrics" not in cells["taylor-0.9"]


def test_all_stands_for_every_method_beside_others():
    given = Bench(model="m", out=Path("out"), methods="all,sparse:apt,random", ratios=(0.2,)).cells()
    assert [cell.method for cell in given.values()] == [None, *methods.METHODS, "sparse:apt"]


def test_tables_and_figures(finished):
    from matplotlib import image

    with (finished / "bench.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["dense", "random", "taylor", "sparse:wanda:2:4", "random", "taylor"]
    assert rows[1]["perplexity at 32"] and not rows[4]["perplexity at 32"] and rows[4]["note"].startswith("failed: ")
    assert rows[3]["error"] and not rows[1]["error"]
    page = (finished / "bench.md").read_text()
    assert re.findall("^## (.*)$", page, re.M) == ["Ratio 0.3", "Ratio 0.5", "Ratio 0.9"] and page.count("failed: ") == 2
    for figure in ("quality_size", "seconds_quality"):
        assert image.imread(finished / f"{figure}.png").std() > 0.01


def test_only_what_is_missing_is_measured_again(finished, bench, tmp_path, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "cells" / "taylor-0.3.json").unlink()
    asked = []
    result = json.loads((finished / "cells" / "taylor-0.3.json").read_text())
    monkeypatch.setattr(_bench_cell, "apart", lambda cell: (asked.append((cell.method, cell.ratio)), result)[1])
    done = bench(out, "--methods", METHODS, "--ratios", 0.3, 0.9, "--json", tmp_path / "b.json")
    assert done.status == 0 and asked == [("taylor", 0.3)]
    assert re.findall("^== (.*)$", done.err, re.M) == ["taylor-0.3 (cell 3 of 6)"]
    assert (out / "bench.csv").read_bytes() == (finished / "bench.csv").read_bytes()
    assert [row["failed"] for row in json.loads((tmp_path / "b.json").read_text())["failed"]] == ["random-0.9", "taylor-0.9"]
    assert "random-0.9" in done.out


def test_what_loses_to_random_is_marked(finished, bench, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    path = out / "cells" / "taylor-0.3.json"
    cell = json.loads(path.read_text())
    path.write_text(json.dumps(cell | dict(metrics=cell["metrics"] | dict(perplexity="inf"))))
    done = bench(out, "--methods", "random,taylor", "--ratios", 0.3)
    assert done.status == 0 and re.search("taylor .* worse than random", done.out)
    assert re.search(r"^\| taylor .*\| inf .*\| worse than random", (out / "bench.md").read_text(), re.M)


def test_other_settings_are_another_bench(finished, refused, dense, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    assert "other settings (calibration)" in refused("bench", dense, "--out", out, *SMALL, "--seed", 1)


def test_a_process_that_breaks_down_does_not_end_the_bench(finished, bench, tmp_path, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "cells" / "random-0.3.json").unlink()
    monkeypatch.setattr(_bench_cell, "START", "import os; os.kill(os.getpid(), 9)")
    done = bench(out, "--methods", "random,taylor", "--ratios", 0.3)
    assert done.status == 2 and "random-0.3: its process ended with status -9" in done.err.splitlines()[-1]
    assert not (out / "cells" / "random-0.3.json").exists() and list(json.loads((out / "bench.json").read_text())["cells"])


def test_ctrl_c_leaves_the_cells_that_are_there(finished, bench, tmp_path, monkeypatch):
    def stop(cell):
        raise KeyboardInterrupt

    out = shutil.copytree(finished, tmp_path / "out")
    (out / "cells" / "taylor-0.3.json").unlink()
    monkeypatch.setattr(_bench_cell, "apart", stop)
    done = bench(out, "--methods", "random,taylor", "--ratios", 0.3)
    assert done.status == 2 and "interrupted" in done.err and (out / "cells" / "random-0.3.json").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--methods", "random,tailor"), "method: 'tailor' given; allowed are kfac-obs, taylor, "),
        (("--methods", "random:l2"), "methods: 'random:l2' given; only taylor has variants: taylor:param_first, "),
        (("--methods", "sparse:taylor"), "method: 'taylor' given; allowed are magnitude, wanda, sparsegpt, apt"),
        (("--methods", "sparse:apt:4:2"), "nm: '4:2' given"),
        (("--methods", "sparse:apt:"), "nm: '' given"),
        (("--ratios", 0.2, 1.5), "ratio: 1.5 given; allowed is between 0 and 1"),
        (("--text", "nowhere.txt"), "nowhere.txt: no such file"),
        (("--calibration", "nowhere.txt"), "nowhere.txt: no such file"),
        (("--choice", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--samples", 0), "samples: 0 given; ask for at least 1"),
        (("--length", 1), "length: 1 given; ask for at least 2"),
        (("--window", 64, "--max-tokens", 32), "max_tokens: 32 given, window 64 asked"),
    ],
)
def test_bad_flags(refused, model, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(_bench_cell, "apart", None)
    assert message in refused("bench", model, "--out", tmp_path / "out", *flags)


def test_bad_places(refused, model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "not empty and not a run of jaxprune" in refused("bench", model, "--out", out)
    assert "nowhere: no such folder or file" in refused("bench", tmp_path / "nowhere", "--out", tmp_path / "new")
