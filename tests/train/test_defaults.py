"""What 'auto' means: learning rate, steps, micro-batch."""

from __future__ import annotations

import pytest
import torch

from lorakit.tasks.text.base import suited_rate
from lorakit.train import defaults
from lorakit.train.config import TrainConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def config(**changes) -> TrainConfig:
    return TrainConfig(data="x", **changes)


def test_the_learning_rate_falls_with_the_models_width_and_says_so():
    wide, narrow = (defaults.learning_rate(config(), suited_rate(width), 1000) for width in (4096, 512))
    assert wide.value < 5e-4 < narrow.value
    assert "width 4096" in wide.reason
    assert defaults.learning_rate(config(), suited_rate(2000), 1000).value == 5e-4
    assert defaults.learning_rate(config(), suited_rate(None), 1000).value == 2e-4


def test_a_short_run_gets_a_higher_rate_and_full_fine_tuning_a_tenth():
    usual = defaults.learning_rate(config(), suited_rate(2000), 100).value
    short = defaults.learning_rate(config(), suited_rate(2000), 99)
    assert short.value == pytest.approx(1.5 * usual)
    assert "100 steps" in short.reason
    full = defaults.learning_rate(config(method="full"), suited_rate(2000), 100)
    assert full.value == pytest.approx(usual / 10)
    assert "10th" in full.reason


def test_a_learning_rate_that_is_given_is_taken():
    choice = defaults.learning_rate(config(learning_rate=3e-3, method="full"), suited_rate(2000), 5)
    assert (choice.value, choice.reason) == (3e-3, "as given")


@pytest.mark.parametrize(
    "settings, rows, steps",
    [
        ({"epochs": 2, "batch_size": 4}, 10, 6),  # three batches a pass, the last one short
        ({"epochs": 0.5, "batch_size": 4}, 16, 2),
        ({"epochs": 0.01, "batch_size": 4}, 16, 1),
        ({"epochs": 2, "batch_size": 64}, 10, 2),  # more than there are rows
        ({"epochs": 2, "steps": 7}, 10, 7),
    ],
)
def test_steps_come_from_epochs_unless_given(settings, rows, steps):
    assert defaults.total_steps(config(**settings), rows) == steps


def test_the_micro_batch_fits_the_rows_length_the_batch_and_the_processes():
    assert defaults.micro_batch(config(), 100, CPU, 1).value == 16
    assert defaults.micro_batch(config(), 1024, CPU, 1).value == 4
    assert defaults.micro_batch(config(), 100_000, CPU, 1).value == 1
    assert defaults.micro_batch(config(), 1024, GPU, 2).value == 8
    assert defaults.micro_batch(config(micro_batch=64), 1024, GPU, 2).value == 8
    assert defaults.micro_batch(config(batch_size=1), 1024, CPU, 4).value == 1


def test_about_ten_evaluations_and_a_checkpoint_at_each():
    assert defaults.evaluate_every(config(), 600) == 60
    assert defaults.evaluate_every(config(), 3) == 1
    assert defaults.save_every(config(), 600) == 60
    assert defaults.save_every(config(save_every=7, eval_every=9), 600) == 7
