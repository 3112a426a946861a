"""A base model's fingerprint: enough to tell that an adapter meets the base it was trained on.

The architecture's name, the shapes of all parameters (as one hash), and sixteen numbers from each of four matrices. The
numbers are compared to about one percent, so that the same base in another precision is still the same base.

A quantized weight counts as the weight that was quantized: its shape goes into the hash, its dequantized numbers are
the samples, and "rounding" says how far each of them may lie from the unquantized one. So an adapter goes from a base
in 4 bits to the same base in 16 and back; where nothing is quantized, nothing more than one percent is allowed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SAMPLED, NUMBERS = 4, 16
# Relative to the number itself, absolute, and relative to the largest of the sixteen: what bf16 and fp16 round away.
RELATIVE, ABSOLUTE, OF_LARGEST = 0.02, 1e-4, 0.01


@dataclass(frozen=True)
class Quantized:
    """A quantized weight. `shape`: of the weight that was quantized; `read`: from flat positions in that shape [n] to
    the dequantized elements there, and how far each may lie from the unquantized one.
    """

    shape: tuple[int, ...]
    read: Callable[[Tensor], tuple[Tensor, Tensor]]
    is_meta: bool = False

    def numel(self) -> int:
        return math.prod(self.shape)

    def is_floating_point(self) -> bool:
        return True


Weight = Tensor | Quantized


def fingerprint(parameters: Mapping[str, Weight], architecture: str) -> dict[str, Any]:
    """The fingerprint as plain data. `parameters`: the base's own, by name."""
    shapes = sorted((name, list(p.shape)) for name, p in parameters.items() if p.is_floating_point())
    matrices = [name for name, shape in shapes if len(shape) >= 2]
    chosen = [matrices[i * (len(matrices) - 1) // max(SAMPLED - 1, 1)] for i in range(SAMPLED)] if matrices else []
    read = {name: _numbers(parameters[name]) for name in dict.fromkeys(chosen) if not parameters[name].is_meta}
    rounding = {name: errors for name, (_, errors) in read.items() if any(errors)}
    return {
        "architecture": architecture,
        "parameters": sum(p.numel() for p in {id(p): p for p in parameters.values()}.values()),  # a tied weight once
        "shapes": hashlib.sha256(repr(shapes).encode()).hexdigest()[:16],
        "samples": {name: numbers for name, (numbers, _) in read.items()},
        **({"rounding": rounding} if rounding else {}),
    }


def differences(expected: Any, parameters: Mapping[str, Weight], architecture: str) -> list[str]:
    """What tells the model with these parameters from the one fingerprinted; empty if nothing does."""
    if not is_sound(expected):
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
    for name in expected["samples"]:
        weight = parameters.get(name)
        if weight is None:
            lines.append(f"weights: {name} is not in this model")
        elif weight.is_floating_point() and not weight.is_meta:
            numbers, errors = _numbers(weight)
            if not alike(expected, {"samples": {name: numbers}, "rounding": {name: errors}}, name):
                lines.append(f"weights: {name} holds other values")
    return lines


def alike(then: Mapping[str, Any], now: Mapping[str, Any], name: str) -> bool:
    """Whether the samples that two fingerprints have of one weight may be of the same base."""
    a, b = (torch.tensor(each["samples"][name], dtype=torch.float64) for each in (then, now))
    if a.shape != b.shape:
        return False
    largest = float(a.abs().max()) if a.numel() else 0.0
    allowed = ABSOLUTE + OF_LARGEST * largest + RELATIVE * b.abs()
    for each in (then, now):
        errors = each.get("rounding", {}).get(name)
        if errors is not None:
            if len(errors) != len(a):
                return False
            allowed = allowed + torch.tensor(errors, dtype=torch.float64)
    return bool(((a - b).abs() <= allowed).all())  # NaN is like nothing


def is_sound(value: Any) -> bool:
    """Whether this, from a file, has the form of a fingerprint."""
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("parameters"), int)
        and _are_rows(value.get("samples"))
        and _are_rows(rounding := value.get("rounding", {}))
        and all(0 <= n < math.inf for row in rounding.values() for n in row)
    )


def _are_rows(value: Any) -> bool:
    """Whether this is a list of numbers for each name."""
    return isinstance(value, Mapping) and all(
        isinstance(row, list) and all(isinstance(n, int | float) for n in row) for row in value.values()
    )


def places(count: int) -> list[int]:
    """Which of a tensor's `count` numbers a fingerprint takes: evenly from the first to the last."""
    return torch.linspace(0, count - 1, NUMBERS, dtype=torch.float64).long().tolist()


def _numbers(weight: Weight) -> tuple[list[float], list[float]]:
    """The sampled numbers, and how far each may lie from the unquantized one: 0 where nothing is quantized."""
    at = torch.tensor(places(weight.numel()))
    if isinstance(weight, Quantized):
        values, errors = weight.read(at)
        return _rounded(values), _rounded(errors)
    flat = weight.detach().flatten()
    return _rounded(flat[at.to(flat.device)].float()), [0.0] * len(at)


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{v:.4g}") for v in values.cpu().tolist()]
