"""The command line itself: help, usage errors, exit status. What the commands do is tested in `tests/commands`."""

import re
import subprocess
import sys

import pytest

from jaxprune import cli

FLAGS = dict(
    run="MODEL --out --ratio --method --calibration --data --text --prompt --json",
    prune="MODEL --out --method --ratio --calibration --samples --length --seed --taylor --aggregate --ranking --units "
    "--layers --protect-first --protect-last --layers-at-once --steps --multiple-of --max-distinct --for --target-params "
    "--target-memory --dtype --overwrite --mesh --strict-sharding --json",
    sparsify="MODEL --out --method --sparsity --layerwise --spread --nm --variant --block --skip --damp --calibration "
    "--samples --length --seed --dtype --overwrite --json",
    recover="MODEL --data --out --rank --alpha --steps --batch-size --length --learning-rate --resume --distill --train --mesh "
    "--strict-sharding --json",
    evaluate="MODEL --text --window --max-tokens --choice --limit --tasks --mesh --strict-sharding --json",
    search="MODEL --out --strategy --ratio --target-params --target-memory --target-flops --target-latency --target-throughput "
    "--batch --context --phase --calibration --fitness --fitness-samples --generations --preset --trials --at-once --layers "
    "--attention-units --multiple-of --min-kept --for --dtype --overwrite --json",
    bench="MODEL --out --methods --ratios --calibration --samples --length --seed --text --window --max-tokens --choice "
    "--limit --dtype --overwrite --json",
    export="MODEL --to --out --check --type --overwrite --json",
    generate="MODEL --prompt --max-new-tokens --temperature --seed --json",
    verify="DENSE PRUNED --json",
    size="--model-config --mesh --stage --method --layers-at-once --batch --length --dtype --json",
    inspect="MODEL --json",
    methods="--json",
)


@pytest.fixture
def run(capsys):
    def run(*words):
        with pytest.raises(SystemExit) as stopped:
            cli.main(words)
        return stopped.value.code, *capsys.readouterr()

    return run


def test_every_command_has_its_help():
    assert {name for name, _ in cli.COMMANDS.values()} == FLAGS.keys()


@pytest.mark.parametrize("command", FLAGS)
def test_help(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0 and out.startswith(f"usage: jaxprune {command} ")
    for flag in FLAGS[command].split():
        assert re.search(rf"(^|\s){flag}(\s|$)", out), flag
    assert "None" not in out


def test_help_names_the_commands(run):
    status, out, _ = run("--help")
    assert status == 0 and all(re.search(rf"• {name}\s", out) for name in FLAGS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Missing subcommand"),
        (("shrink",), "Unrecognized options"),
        (("prune",), "--out"),
        (("prune", "model", "--out", "out", "--ratio", "much"), "float"),
        (("prune", "model", "--out", "out", "--ranking", "none"), "local"),
        (("prune", "model", "--out", "out", "--no-such-flag"), "--no-such-flag"),
        (("recover", "model", "--data", "builtin", "--out", "out", "--rank", "2.5"), "int"),
        (("methods", "--json"), "--json"),
    ],
)
def test_usage_errors(run, words, message):
    status, out, err = run(*words)
    assert status == 2 and out == "" and message in err and "Traceback" not in err


def test_the_module_runs_and_a_reader_may_stop_early():
    command = [sys.executable, "-W", "error", "-m", "jaxprune", "methods"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
    process.stderr.close()
