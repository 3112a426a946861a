"""A run that has diverged is noticed at once, stops unless told otherwise, and its last good checkpoint stays."""

from __future__ import annotations

import math

import pytest

from lorakit.errors import TrainError
from lorakit.model.activate import active
from lorakit.tasks import causal_lm
from lorakit.train import divergence, resume
from lorakit.train.loop import Loop
from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.train import train

QUIET = Progress(quiet=True)


def test_what_counts_as_diverged():
    assert divergence.is_dead(math.log(4096), 0.0)
    assert not divergence.is_dead(math.log(4096), 1e-30)
    assert not divergence.is_dead(0.0, 0.0)  # a perfect fit
    assert divergence.is_worse(4.1, 3.0, 1.0)
    assert not divergence.is_worse(3.9, 3.0, 1.0)


def test_a_rate_that_is_too_high_ends_in_guessing_and_is_reported(make_config):
    config = make_config(steps=20, learning_rate=30.0, schedule="constant", warmup=0, sample_tokens=0)
    with pytest.raises(TrainError, match=r"the gradient is exactly zero at step \d+, with a loss of 5\.\d+") as error:
        train(config, QUIET)
    assert "(now 30)" in str(error.value)


@pytest.fixture
def sudden(monkeypatch):
    """`sudden(step)`: the held-out loss is 9 from the evaluation of this step on, with the adapter."""

    def make(step, every):
        real, calls = causal_lm.evaluate, []

        def evaluate(base, items, batch_size):
            tuned = bool(active(base.model))
            calls.extend([1] * tuned)
            loss = 9.0 if tuned and len(calls) * every == step else real(base, items, batch_size)["loss"]
            return {"loss": loss, "perplexity": math.exp(loss)}

        monkeypatch.setattr(causal_lm, "evaluate", evaluate)

    return make


def test_the_last_good_checkpoint_stays_however_many_were_written_since(make_config, sudden):
    sudden(8, 4)
    config = make_config(steps=12, eval_every=4, save_every=1, keep=2)
    with pytest.raises(TrainError, match=r"at step 8 .*; the last good checkpoint is .*/step-4\n"):
        train(config, QUIET)
    assert resume.steps_in(RunFolder(config.out).checkpoints) == [4, 6, 7]


def test_a_run_that_was_never_better_says_that_there_is_no_good_checkpoint(make_config, sudden):
    sudden(2, 2)
    config = make_config(steps=4)
    with pytest.raises(TrainError, match=r"more than 1.0 above the base's, 5\.\d+; no checkpoint from before that"):
        train(config, QUIET)
    folder = RunFolder(config.out)
    assert folder.report.exists()
    assert not folder.adapter.exists()
    assert folder.rows()[-1]["held_out_loss"] == 9.0


def test_it_trains_on_if_it_is_to(make_config, sudden, capsys):
    sudden(4, 2)
    assert train(make_config(steps=8, diverged="continue"), QUIET).step == 8
    assert capsys.readouterr().err.count("the run has diverged: at step 4") == 1


def test_a_gradient_of_exactly_zero_stops_before_the_update(make_config, monkeypatch):
    real, steps = Loop._gradients, []

    def gradients(self, runs, batches):
        losses, norms, apart = real(self, runs, batches)
        steps.append(1)
        if len(steps) == 3:
            for p in runs[0].parameters.values():
                p.grad.zero_()
        return losses, norms * (len(steps) != 3), apart

    monkeypatch.setattr(Loop, "_gradients", gradients)
    config = make_config(steps=6, eval_every=2, validation=0)
    with pytest.raises(TrainError, match=r"the gradient is exactly zero at step 3, with a loss of .*/step-2\n"):
        train(config, QUIET)
    steps.clear()
    assert train(config.replace(diverged="continue"), QUIET).step == 6


def test_a_run_of_a_sweep_that_diverged_leaves_and_the_others_go_on(model_folder, data_file, tmp_path):
    from lorakit.train.sweep.sweep import sweep
    from lorakit.train.sweep.sweep_config import expand
    from lorakit.train.sweep.sweep_progress import SweepProgress

    plan = expand(
        {
            "model": str(model_folder),
            "data": str(data_file),
            "out": str(tmp_path / "sweep"),
            "rank": 2,
            "steps": 16,
            "schedule": "constant",
            "batch_size": 4,
            "learning_rate": [1e-3, 30.0],
            "warmup": 0,
            "precision": "fp32",
            "threads": 1,
        }
    )
    first, second = sweep(plan, SweepProgress(quiet=True)).entries
    assert (first.learning_rate, first.failed) == (1e-3, None)
    assert "the run has diverged" in second.failed
