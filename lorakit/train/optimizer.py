"""The run's optimizer, its learning-rate schedule, and clipping. `config.optimizers` lists the optimizers."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import RunSettings
from ..config.optimizers import MUON_OVER_ADAMW, OPTIMIZERS
from ..errors import ConfigError
from .lion import Lion
from .muon import MuonWithAdamW, muon_matrices, split

LABEL, FACTOR = "label", "factor"  # of a parameter group: its name, and its learning rate as a factor of the run's

# Where bitsandbytes 0.50 has kernels for them. On a CPU its paged ones are the plain ones.
_EIGHT_BIT = {"adamw8bit": ("cuda", "xpu", "cpu"), "paged_adamw8bit": ("cuda", "xpu")}


def check(config: RunSettings, device: torch.device) -> None:
    """Raise ConfigError if the run's optimizer does not work on this device, or has no automatic learning rate."""
    if config.learning_rate == "auto" and OPTIMIZERS[config.optimizer].rate is None:
        raise ConfigError(
            f"optimizer: {config.optimizer} has no automatic learning rate, since its steps are as large as the "
            "gradients\n  give learning_rate, such as 0.1 with clip: 1"
        )
    devices = _EIGHT_BIT.get(config.optimizer)
    if devices is None:
        return
    if device.type not in devices:
        other = "adamw8bit" if device.type in _EIGHT_BIT["adamw8bit"] else "adafactor or lion"
        raise ConfigError(
            f"optimizer: {config.optimizer} works on {' and '.join(devices)}, and this run is on {device.type}\n"
            f"  for less optimizer state here use {other}"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"optimizer: {config.optimizer} is bitsandbytes', which is not installed\n"
            "  pip install bitsandbytes, or use adafactor or lion for less optimizer state"
        )


def build(
    config: RunSettings,
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    rate: float,
    factor: Callable[[str], tuple[str, float]] = lambda name: ("", 1.0),
) -> torch.optim.Optimizer:
    """Build the optimizer for a run's trained parameters, those of `model`. `rate`: the peak learning rate.

    `factor`: a parameter's name -> the name of its group, and the group's learning rate as a factor of `rate`.
    """
    by_factor: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        by_factor.setdefault(factor(name), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": own, "lr": rate * f, LABEL: label, FACTOR: f} for (label, f), own in by_factor.items()
    ]
    name, decay, betas = config.optimizer, config.weight_decay, (config.beta1, config.beta2)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=betas, weight_decay=decay, fused=True)
    if name == "adafactor":
        return torch.optim.Adafactor(groups, lr=rate, eps=(None, 1.0), weight_decay=decay)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=momentum(config), weight_decay=decay)
    if name == "lion":
        return Lion(groups, lr=rate, betas=(config.beta1, momentum(config)), weight_decay=decay)
    if name == "muon":
        matrices = {parameters[matrix] for matrix in muon_matrices(model, parameters)}
        of_matrices, others = split(groups, matrices)
        slower = [
            group
            | {
                "lr": group["lr"] / MUON_OVER_ADAMW,
                FACTOR: group[FACTOR] / MUON_OVER_ADAMW,
                LABEL: "_".join(filter(None, (group[LABEL], "adamw"))),
            }
            for group in others
        ]
        return MuonWithAdamW(of_matrices, slower, rate, momentum(config), betas, decay)
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    for parameter in parameters.values():
        parameter.data = parameter.data.contiguous()  # bitsandbytes reads the memory in this order
    kind = PagedAdamW8bit if name == "paged_adamw8bit" else AdamW8bit
    optimizer: torch.optim.Optimizer = kind(groups, lr=rate, betas=betas, weight_decay=decay)
    return optimizer


def momentum(config: RunSettings) -> float:
    """Return the run's momentum, that of its optimizer if it is "auto"."""
    own = OPTIMIZERS[config.optimizer].momentum
    return float(own or 0.0) if config.momentum == "auto" else float(config.momentum)


def describe(config: RunSettings, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> str:
    """Describe the optimizer for the start panel, with the settings that it has."""
    spec = OPTIMIZERS[config.optimizer]
    values = {"beta1": config.beta1, "beta2": config.beta2, "momentum": momentum(config)}
    said = [spec.summary, *(f"{name} {values[name]:g}" for name in values if name in spec.settings)]
    if config.optimizer == "muon":
        matrices = len(muon_matrices(model, parameters))
        said[0] = f"Muon for {matrices} matrices, AdamW for {len(parameters) - matrices} other parameters"
    return ", ".join([*said, f"weight decay {config.weight_decay:g}", f"clipping {config.clip:g}"])


def state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return a parameter's state as tensors on the CPU, for a checkpoint. A step counted as a Python integer is int64,
    one that torch counts is float32.
    """
    held = optimizer.state.get(parameter, {})
    return {
        name: torch.tensor(value) if isinstance(value, int) else value.detach().cpu().contiguous().clone()
        for name, value in held.items()
    }


def put_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> None:
    """Put back what `state_of` returned."""
    put: dict[str, Any] = {}
    for name, value in state.items():
        if value.dim() == 0 and value.dtype == torch.int64:
            put[name] = int(value)
        elif getattr(optimizer, "is_paged", False) and value.shape == parameter.shape:
            put[name] = optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)  # type: ignore[attr-defined]
        else:
            put[name] = value.to(parameter.device)
    optimizer.state[parameter] = put


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


def rate_factor(config: RunSettings, step: int, steps: int) -> float:
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
