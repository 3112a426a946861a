"""The optimizer (AdamW), its learning-rate schedule, and clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from .config import TrainConfig

LABEL, FACTOR = "label", "factor"  # of a parameter group: its name, and its learning rate as a factor of the run's


def adamw(
    config: TrainConfig,
    parameters: Mapping[str, nn.Parameter],
    rate: float,
    factor: Callable[[str], tuple[str, float]] = lambda name: ("", 1.0),
) -> torch.optim.AdamW:
    """Build AdamW for a run's trained parameters. `rate`: the peak learning rate.

    `factor`: a parameter's name -> the name of its group, and the group's learning rate as a factor of `rate`.
    """
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(factor(name), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": own, "lr": rate * f, LABEL: label, FACTOR: f} for (label, f), own in groups.items()],
        lr=rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )


def update(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], rate: float, norm: float, clip: float
) -> dict[str, float]:
    """Take one step at the learning rate `rate`, with gradients clipped to a total norm of `clip` (0: not clipped).

    `norm`: the gradients' total norm, computed already. Returns the rates of groups that have a name.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group[FACTOR]
    if clip:
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), clip, torch.tensor(norm))
    optimizer.step()
    return {group[LABEL]: group["lr"] for group in optimizer.param_groups if group[LABEL]}


def rate_factor(config: TrainConfig, step: int, steps: int) -> float:
    """Return the learning rate at optimizer step `step` (from 0) as a share of the peak rate.

    It rises linearly during warm-up and then follows the schedule, which reaches zero after the last of `steps`.
    """
    warm = max(1, round(config.warmup * steps)) if config.warmup else 0
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    if config.schedule == "linear":
        return 1 - done
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0
