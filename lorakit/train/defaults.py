"""Resolve 'auto' settings: each to a value, with the reason that the start panel prints."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..config import Choice
from ..config.optimizers import OPTIMIZERS
from ..methods import method_of
from ..tasks import task_of
from .config import TrainConfig

if TYPE_CHECKING:
    import torch

SHORT_RUN, SHORT_FACTOR = 100, 1.5
EVALUATIONS = 10  # per run


def learning_rate(config: TrainConfig, suited: Choice, steps: int) -> Choice:
    """Return the peak learning rate and why.

    `suited`: what suits LoRA on the base (`Task.learning_rate`); `steps`: optimizer steps of the run. `auto` is that
    rate, x1.5 for runs under 100 steps ("LoRA Without Regret", 2025).
    """
    if config.learning_rate != "auto":
        return Choice(float(config.learning_rate), "as given")
    rate, why = method_of(config.method).learning_rate(suited.value, suited.reason)
    spec = OPTIMIZERS[config.optimizer]
    if spec.rate is not None and spec.why:
        rate, why = rate * spec.rate, f"{why}, {spec.why}"
    if steps < SHORT_RUN:
        rate, why = rate * SHORT_FACTOR, f"{why}, x{SHORT_FACTOR:g} for under {SHORT_RUN} steps"
    return Choice(float(f"{rate:.2g}"), why)


def total_steps(config: TrainConfig, rows: int) -> int:
    """Return the run's number of optimizer steps. `rows`: training rows."""
    return config.steps or max(1, math.ceil(config.epochs * steps_per_epoch(config, rows)))


def steps_per_epoch(config: TrainConfig, rows: int) -> int:
    """Return the optimizer steps of one pass over `rows` training rows."""
    return math.ceil(rows / config.batch_size)


def micro_batch(config: TrainConfig, longest: int, device: torch.device, processes: int) -> Choice:
    """Return how many rows one device computes at once, and why. `longest`: size of the largest row."""
    share = max(1, math.ceil(config.batch_size / processes))
    if config.micro_batch != "auto":
        return Choice(min(int(config.micro_batch), share), "as given")
    task = task_of(config.task)
    size = task.size_at_once(device)
    if size is not None:
        kind = "a CPU" if device.type == "cpu" else device.type
        return Choice(min(share, max(1, size // longest)), f"about {size:,} {task.size_unit} at once on {kind}")
    return Choice(share, "the entire batch at once")


def evaluate_every(config: TrainConfig, steps: int) -> int:
    """Return the number of steps between evaluations. `steps`: of the run."""
    return int(config.eval_every) if config.eval_every != "auto" else max(1, math.ceil(steps / EVALUATIONS))


def save_every(config: TrainConfig, steps: int) -> int:
    """Return the number of steps between checkpoints. `steps`: of the run."""
    return int(config.save_every) if config.save_every != "auto" else evaluate_every(config, steps)
