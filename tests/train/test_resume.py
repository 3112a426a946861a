"""A run that is killed and taken up again ends with the same bits as one that never was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_lm
import yaml

from lorakit.errors import TrainError, WriteError
from lorakit.train import resume
from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.train import train

QUIET = Progress(quiet=True)
SCRIPT = Path(__file__).with_name("killed_runs.py")
COMMAND = [sys.executable, "-c", "from lorakit.cli import main; main()"]
# Number of whole runs in the stress test, each killed several times: LORAKIT_KILL_TRIALS=20 pytest -m slow
# tests/train/test_resume.py
TRIALS = int(os.environ.get("LORAKIT_KILL_TRIALS", "3"))
KILLS = 6


@pytest.fixture
def eventful(make_config):
    """`eventful(out)`: a run with dropout, accumulation, validation, samples, and an early stop well before its last
    step.
    """

    def make(out):
        return make_config(
            out=out,
            dropout=0.2,
            batch_size=6,
            micro_batch=4,
            steps=60,
            learning_rate=0.03,
            schedule="constant",
            eval_every=2,
            save_every=3,
            patience=2,
            sample_tokens=2,
        )

    return make


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, model_folder, data_file):
    """The folder of the eventful run, not disturbed, by the name of its test's settings."""
    done = {}

    def make(config):
        if not done:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            done["result"] = train(config.replace(out=str(folder)), QUIET)
            done["folder"] = RunFolder(folder)
        return done["folder"], done["result"]

    return make


def outcome(folder: RunFolder) -> dict:
    """All that a run leaves, timing apart."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in folder.rows()]
    state = json.loads(
        (folder.checkpoints / f"step-{resume.steps_in(folder.checkpoints)[-1]}" / "state.json").read_text()
    )
    return {
        "adapter": (folder.adapter / "adapter_model.safetensors").read_bytes(),
        "lorakit.json": json.loads((folder.adapter / "lorakit.json").read_text()),
        "rows": rows,
        "samples": {file.name: file.read_text() for _, file in folder.sampled()},
        "state": {k: v for k, v in state.items() if k != "seconds"},
        "files": sorted(str(p.relative_to(folder.path)) for p in folder.path.rglob("*")),
    }


def assert_same(ours: RunFolder, theirs: RunFolder) -> None:
    found, expected = outcome(ours), outcome(theirs)
    for what in expected:
        assert found[what] == expected[what], what


def killed(config, how: str, seed: int, kills: int, tmp_path: Path) -> dict:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump()))
    done = subprocess.run(
        [sys.executable, SCRIPT, file, how, str(seed), str(kills)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["ends"] == [-signal.SIGKILL] * len(told["kills"]) + [0], done.stderr
    return told


def test_two_undisturbed_runs_leave_the_same_bits(eventful, undisturbed, tmp_path):
    config = eventful(tmp_path / "run")
    folder, result = undisturbed(config)
    assert result.stopped == "early"
    assert result.best_step < result.step < 60
    train(config, QUIET)
    assert_same(RunFolder(config.out), folder)


def test_a_run_killed_at_random_moments_ends_with_the_bits_of_one_that_was_not(eventful, undisturbed, tmp_path):
    config = eventful(tmp_path / "run")
    told = killed(config, "clock", 11, KILLS, tmp_path)
    assert len(told["kills"]) >= KILLS - 2, told["kills"]  # fewer if the run came to its end before
    assert_same(RunFolder(config.out), undisturbed(config)[0])


def test_a_run_killed_inside_its_writes_ends_with_the_bits_of_one_that_was_not(eventful, undisturbed, tmp_path):
    config = eventful(tmp_path / "run")
    told = killed(config, "file", 3, 8, tmp_path)
    assert sum(writing for *_, writing in told["kills"]) >= 2, told["kills"]
    assert_same(RunFolder(config.out), undisturbed(config)[0])


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(TRIALS))
def test_stress_of_kills(eventful, undisturbed, tmp_path, trial):
    config = eventful(tmp_path / "run")
    told = killed(config, ("clock", "file")[trial % 2], 1000 + trial, KILLS, tmp_path)
    print(f"\ntrial {trial}: {len(told['kills'])} kills, at (step, checkpoint, writing) {told['kills']}")
    assert_same(RunFolder(config.out), undisturbed(config)[0])


def test_the_command_line_goes_on_after_a_kill_with_the_config_it_wrote(eventful, undisturbed, tmp_path):
    config = eventful(tmp_path / "run")
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump(config.model_dump()))
    process = subprocess.Popen(
        [*COMMAND, "train", "--config", file, "--quiet"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    folder = RunFolder(config.out)
    wait_for_step(folder, process, 4)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert folder.rows()
    assert not folder.adapter.exists()
    again = subprocess.run([*COMMAND, "train", "--config", folder.config], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "resuming at step" in again.stdout
    assert_same(folder, undisturbed(config)[0])


def wait_for_step(folder: RunFolder, process: subprocess.Popen, step: int) -> None:
    """Until the run has logged this step."""
    until = time.monotonic() + 60
    while not any(row["step"] >= step for row in folder.rows()):
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < until
        time.sleep(0.002)


def test_a_finished_run_started_again_only_says_so_again(eventful, undisturbed, tmp_path):
    config = eventful(tmp_path / "run")
    first = train(config, QUIET)
    again = train(config, QUIET)
    assert (again.step, again.best_step, again.best_loss, again.stopped) == (
        first.step,
        first.best_step,
        first.best_loss,
        "early",
    )
    assert again.loss == first.loss
    assert_same(RunFolder(config.out), undisturbed(config)[0])


def test_going_on_with_other_settings_is_refused_and_changes_nothing(make_config):
    config = make_config(steps=2)
    train(config, QUIET)
    before = {p: p.read_bytes() for p in RunFolder(config.out).path.rglob("*") if p.is_file()}
    with pytest.raises(TrainError, match=r"rank: was 4, is now 9"):
        train(config.replace(rank=9), QUIET)
    assert {p: p.read_bytes() for p in RunFolder(config.out).path.rglob("*") if p.is_file()} == before


def test_going_on_with_other_rows_is_refused(make_config, tmp_path):
    data = tiny_lm.write_rows(tmp_path / "rows.jsonl", tiny_lm.rows())
    config = make_config(data=data, steps=2)
    train(config, QUIET)
    tiny_lm.write_rows(data, [*tiny_lm.rows()[:-1], {"prompt": "x", "completion": "another"}])
    with pytest.raises(TrainError, match="the tokenized rows: SHA-256 was"):
        train(config, QUIET)


def test_full_fine_tuning_goes_on_exactly_too(make_config, tmp_path, monkeypatch):
    config = make_config(method="full", steps=6, save_every=2, learning_rate=1e-3)
    undisturbed = train(config.replace(out=str(tmp_path / "undisturbed")), QUIET)
    real, steps = resume.save, []

    def interrupted(*args, **options):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(resume, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, QUIET)
    monkeypatch.undo()
    again = train(config, QUIET)
    files = [r.adapter / "model.safetensors" for r in (again, undisturbed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_second_training_into_the_same_folder_is_refused_while_the_first_lives(make_config):
    config = make_config(steps=4)
    said = []

    class Second(Progress):
        def row(self, row):
            if not said:
                with pytest.raises(WriteError, match=r"is being written by process \d+"):
                    train(config, QUIET)
                said.append(row)

    train(config, Second(quiet=True))
    assert said
    assert train(config, QUIET).step == 4
