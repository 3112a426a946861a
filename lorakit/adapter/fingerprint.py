"""A base model's fingerprint: enough to tell that an adapter meets the base it was trained on.

The architecture's name, the shapes of all parameters (as one hash), and sixteen numbers from each of four matrices. The
numbers are compared to about one percent, so that the same base in another precision is still the same base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SAMPLED, NUMBERS = 4, 16


def fingerprint(parameters: Mapping[str, Tensor], architecture: str) -> dict[str, Any]:
    """The fingerprint as plain data. `parameters`: the base's own, by name."""
    shapes = sorted((name, list(p.shape)) for name, p in parameters.items() if p.is_floating_point())
    matrices = [name for name, shape in shapes if len(shape) >= 2]
    chosen = [matrices[i * (len(matrices) - 1) // max(SAMPLED - 1, 1)] for i in range(SAMPLED)] if matrices else []
    return {
        "architecture": architecture,
        "parameters": sum(p.numel() for p in {id(p): p for p in parameters.values()}.values()),  # a tied weight once
        "shapes": hashlib.sha256(repr(shapes).encode()).hexdigest()[:16],
        "samples": {name: _numbers(parameters[name]) for name in dict.fromkeys(chosen) if not parameters[name].is_meta},
    }


def differences(expected: Any, parameters: Mapping[str, Tensor], architecture: str) -> list[str]:
    """What tells the model with these parameters from the one fingerprinted; empty if nothing does."""
    if not _sound(expected):
        return ["the adapter's fingerprint of its base is damaged"]
    found = fingerprint(parameters, architecture)
    lines = []
    if expected.get("architecture") != found["architecture"]:
        lines.append(
            f"architecture: the adapter was trained on {expected.get('architecture')}, this is {found['architecture']}"
        )
    if expected.get("shapes") != found["shapes"]:
        lines.append(
            f"shapes of the parameters differ: {expected['parameters']:,} parameters then, {found['parameters']:,} now"
        )
    for name, numbers in expected["samples"].items():
        tensor = parameters.get(name)
        if tensor is None:
            lines.append(f"weights: {name} is not in this model")
        elif tensor.is_floating_point() and not tensor.is_meta:
            then, now = torch.tensor(numbers), torch.tensor(_numbers(tensor))
            if then.shape != now.shape or not torch.allclose(
                then, now, rtol=0.02, atol=1e-4 + 0.01 * float(then.abs().max())
            ):
                lines.append(f"weights: {name} holds other values")
    return lines


def _sound(value: Any) -> bool:
    """Whether this, from a file, has the form of a fingerprint."""
    samples = value.get("samples") if isinstance(value, Mapping) else None
    return (
        isinstance(samples, Mapping)
        and isinstance(value.get("parameters"), int)
        and all(isinstance(row, list) and all(isinstance(n, int | float) for n in row) for row in samples.values())
    )


def places(count: int) -> list[int]:
    """Which of a tensor's `count` numbers a fingerprint takes: evenly from the first to the last."""
    return torch.linspace(0, count - 1, NUMBERS, dtype=torch.float64).long().tolist()


def _numbers(tensor: Tensor) -> list[float]:
    flat = tensor.detach().flatten()
    at = torch.tensor(places(flat.numel()), device=flat.device)
    return [float(f"{v:.4g}") for v in flat[at].float().cpu().tolist()]
