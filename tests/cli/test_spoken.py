"""Errors at the command line speak of flags, one line for one mistake."""

from __future__ import annotations

import pytest

from lorakit.cli.shared.spoken import in_flags
from lorakit.train.config import TrainConfig

MESSAGES = {
    "TrainConfig.rank: expected a whole number (got 'x')": "--rank: expected a whole number (got 'x')",
    "TrainConfig.layers.0: expected x": "--layers: expected x",
    "TrainConfig.settings: find_lr searches": "--find-lr searches",
    "TrainConfig has no setting 'rnk'; did you mean 'rank'?": "there is no setting 'rnk'; did you mean 'rank'?",
    "replace it with force=True (--force)": "replace it with --force",
    "for example rank=16 (--rank 16) or keep=0.95 (--keep 0.95)": "for example --rank 16 or --keep 0.95",
    "--allow-loss (allow_loss=True) leaves that out": "--allow-loss leaves that out",
    "write more digits: dtype=torch.float32 (--dtype fp32); or": "write more digits: --dtype fp32; or",
    "raise max_length, or cut rows (on_long: cut)": "raise --max-length, or cut rows (--on-long cut)",
    "try precision: fp32, or clip: 1": "try --precision fp32, or --clip 1",
    "  rank: was 4, is now 8": "  --rank: was 4, is now 8",
    "rows.jsonl, row 3: prompt is empty": "rows.jsonl, row 3: prompt is empty",
    "runs/batch_size/config.yaml cannot be read": "runs/batch_size/config.yaml cannot be read",
    "nothing can be held out for validation: all rows": "nothing can be held out for validation: all rows",
    "did you mean 'batch_size'?": "did you mean 'batch_size'?",
}


@pytest.mark.parametrize("message", MESSAGES)
def test_settings_and_arguments_become_flags(message):
    assert in_flags(message, TrainConfig.model_fields) == MESSAGES[message]


@pytest.mark.parametrize(
    "args, line",
    [
        (["--rank", "0"], "lorakit: --rank: input should be greater than or equal to 1 (got 0)"),
        (["--micro-batch", "x"], "lorakit: --micro-batch: expected a whole number or 'auto' (got 'x')"),
        (["--learning-rate", "hi"], "lorakit: --learning-rate: expected a number or 'auto' (got 'hi')"),
        (["--find-lr", "--lr", "1"], "lorakit: --find-lr searches for a learning rate, but --learning-rate is 1; give"),
    ],
)
def test_one_mistake_is_one_line(lorakit, args, line):
    code, _, err = lorakit("train", "--data", "x.jsonl", *args)
    assert code == 2
    assert err.startswith(line)
    assert len(err.splitlines()) == 1
