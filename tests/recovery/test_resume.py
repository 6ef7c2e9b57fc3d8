import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune import recovery

STEPS = 12


def start(folder, resume="new", save_every=1):
    script = Path(__file__).with_name("tiny_run.py")
    command = [sys.executable, "-W", "error", str(script), str(folder), str(STEPS), resume, str(save_every)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    *steps, losses = out.splitlines()
    return [int(s) for s in steps], losses.split()


def test_a_killed_run_resumes_to_the_losses_of_the_uninterrupted_one(tmp_path):
    whole = start(tmp_path / "whole")
    process = start(tmp_path / "killed")
    for line in process.stdout:
        if int(line) == 4:  # it goes on saving after every step: the kill falls anywhere in a step or in a save
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    steps, losses = finish(start(tmp_path / "killed", "resume"))
    assert steps == list(range(steps[0], STEPS)) and steps[0] >= 4
    assert (list(range(STEPS)), losses) == finish(whole)


@pytest.fixture
def run(toy):
    def run(folder, *, steps=3, tx=None, width=3, **options):
        adapter = dict(w=jnp.zeros(width))
        tx = tx or optax.sgd(0.1)
        return recovery.fit(toy.loss, toy.params, adapter, toy.batches, tx, steps=steps, checkpoint_dir=folder, **options)

    return run


def test_resuming_a_finished_run_gives_its_result_again(run, tmp_path):
    adapter, losses = run(tmp_path)
    again, same = run(tmp_path, resume=True, callback=lambda step, loss: pytest.fail("a step was repeated"))
    np.testing.assert_array_equal(adapter["w"], again["w"])
    np.testing.assert_array_equal(losses, same)


def test_an_interrupted_run_goes_on_from_its_last_checkpoint(run, tmp_path):
    def stop(step, loss):
        if step == 7:
            raise KeyboardInterrupt

    expected = run(tmp_path / "whole", steps=10, save_every=3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", steps=10, save_every=3, callback=stop)
    seen = []
    got = run(tmp_path / "stopped", steps=10, save_every=3, resume=True, callback=lambda step, loss: seen.append(step))
    assert seen == [6, 7, 8, 9]
    np.testing.assert_array_equal(got[0]["w"], expected[0]["w"])
    np.testing.assert_array_equal(got[1], expected[1])


def test_resume_without_a_checkpoint_starts_at_the_beginning(run, tmp_path):
    np.testing.assert_array_equal(run(tmp_path / "new", resume=True)[1], run(None)[1])


def test_checkpoints_are_not_overwritten_by_a_new_run(run, tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="holds a checkpoint of step 3; resume from it, or choose another folder"):
        run(tmp_path)


@pytest.mark.parametrize(
    "changed, difference",
    [
        (dict(steps=4), "steps was 3, now 4"),
        (dict(accumulate=2), "accumulate was 1, now 2"),
        (dict(settings=dict(data="b", seed=0)), "data was a, now b"),
        (dict(settings=dict(data="a")), "seed was 0, now absent"),
        (dict(tx=optax.sgd(0.1, momentum=0.9)), "trace"),
        (dict(width=4), r"float32\[3\], now float32\[4\]"),
    ],
)
def test_resuming_with_other_settings_is_refused(run, tmp_path, changed, difference):
    options = dict(settings=dict(data="a", seed=0))
    run(tmp_path, **options)
    with pytest.raises(ValueError, match=f"written with other settings.*{difference}"):
        run(tmp_path, resume=True, **options | changed)


def test_resume_needs_a_folder(run):
    with pytest.raises(ValueError, match="resume: needs checkpoint_dir"):
        run(None, resume=True)
