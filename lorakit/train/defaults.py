"""Resolve 'auto' settings: each to a value, with the reason that the start panel prints."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..config import Choice
from ..methods import method_of
from .config import TrainConfig

if TYPE_CHECKING:
    import torch

BASE_RATE = 2e-4
# "LoRA Without Regret" (Thinking Machines, 2025) fits 5e-4 · (2000 / width)^0.775 for Llama models.
WIDTH_RATE, WIDTH, WIDTH_POWER = 5e-4, 2000, 0.775
SHORT_RUN, SHORT_FACTOR = 100, 1.5
EVALUATIONS = 10  # per run
# On a CPU, plain attention is used up to this row length (tokens) where the backward is not ours
# (`layers/fused/attention.py`), because the kernel's backward is slow: a step takes 0.81 to 0.90 of its CPU time
# (bench/short_attention.py). For longer rows, plain attention's memory grows with the square of the length.
PLAIN_ATTENTION = 256
CPU_TOKENS = 4096  # per micro-batch on a CPU: larger matrices are no faster there, and cost memory


def learning_rate(config: TrainConfig, width: int | None, steps: int) -> Choice:
    """Return the peak learning rate and why.

    `width`: the base's hidden size, None if unknown; `steps`: optimizer steps of the run. `auto` is
    5e-4 · (2000 / width)^0.775 for LoRA, x1.5 for runs under 100 steps ("LoRA Without Regret", 2025).
    """
    if config.learning_rate != "auto":
        return Choice(float(config.learning_rate), "as given")
    if width:
        rate, why = WIDTH_RATE * (WIDTH / width) ** WIDTH_POWER, f"for a model of width {width}"
    else:
        rate, why = BASE_RATE, "a common rate for LoRA"
    rate, why = method_of(config.method).learning_rate(rate, why)
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
    """Return how many sequences one device computes at once, and why. `longest`: tokens of the longest row."""
    share = max(1, math.ceil(config.batch_size / processes))
    if config.micro_batch != "auto":
        return Choice(min(int(config.micro_batch), share), "as given")
    if device.type == "cpu":
        fits = max(1, CPU_TOKENS // longest)
        return Choice(min(share, fits), f"about {CPU_TOKENS:,} tokens at once on a CPU")
    return Choice(share, "the entire batch at once")


def evaluate_every(config: TrainConfig, steps: int) -> int:
    """Return the number of steps between evaluations. `steps`: of the run."""
    return int(config.eval_every) if config.eval_every != "auto" else max(1, math.ceil(steps / EVALUATIONS))


def save_every(config: TrainConfig, steps: int) -> int:
    """Return the number of steps between checkpoints. `steps`: of the run."""
    return int(config.save_every) if config.save_every != "auto" else evaluate_every(config, steps)
