"""A run that is killed with SIGKILL right after it has logged a step, some times over, and then comes to its end.

python killed_at_step.py CONFIG.yaml STEP KILLS        prints the attempts' exit codes as JSON
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import diffusers  # noqa: F401 (imported once, before the forks)
import torch
import yaml
from killed_runs import attempt, ended

from lorakit.train.config import TrainConfig
from lorakit.train.run_folder import RunFolder


def killed_at(step: int):
    """Make the process kill itself once this step is logged."""

    def prepare() -> None:
        log = RunFolder.log

        def log_and_die(folder, row):
            log(folder, row)
            if row["step"] == step and "loss" in row:
                os.kill(os.getpid(), signal.SIGKILL)

        RunFolder.log = log_and_die

    return prepare


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = TrainConfig(**yaml.safe_load(Path(sys.argv[1]).read_text()))
    ends = [ended(attempt(settings, killed_at(int(sys.argv[2])))) for _ in range(int(sys.argv[3]))]
    print(json.dumps([*ends, ended(attempt(settings))]))
