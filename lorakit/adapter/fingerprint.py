"""A base model's fingerprint, by which an adapter recognizes the base it was trained on.

It holds the architecture's name, a hash of all parameters' shapes, and sixteen elements of each of four matrices. These
samples may differ by about one percent, so that the same base in another precision is still the same base.

A quantized weight counts as the weight that was quantized: its shape goes into the hash, its dequantized elements are
the samples, and "rounding" says how far each of them may be from the unquantized one. So an adapter can move from a
base in 4 bits to the same base in 16 and back. Without quantization, no more than one percent is allowed.

Of a diffusion pipeline it holds one fingerprint for each component that the adapter changes:

    {"architecture": "UNet2DConditionModel + CLIPTextModel", "parameters": ..., "shapes": ..., "samples": ...,
     "components": {"unet": {"architecture": ..., "parameters": ..., "shapes": ...}, "text_encoder": ...}}
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# An adapter's metadata: how its base was quantized, if its start repaired that (LoftQ), so that it is wrong elsewhere.
ONLY_ON = "only_on_quantized"
TOTALS, SAMPLED = ("architecture", "parameters", "shapes"), ("samples", "rounding")
MATRICES, SAMPLES = 4, 16  # how many matrices, and how many elements of each
# Allowed differences: relative to the element, absolute, and relative to the largest of the sixteen. They cover what
# bf16 and fp16 round away.
RELATIVE, ABSOLUTE, OF_LARGEST = 0.02, 1e-4, 0.01


@dataclass(frozen=True)
class Quantized:
    """A quantized weight. `shape`: of the weight before quantization; `read`: flat positions in that shape [n] -> the
    dequantized elements there and the largest rounding error of each, both [n].
    """

    shape: tuple[int, ...]
    read: Callable[[Tensor], tuple[Tensor, Tensor]]
    is_meta: bool = False

    def numel(self) -> int:
        """Return the number of elements before quantization."""
        return math.prod(self.shape)

    def is_floating_point(self) -> bool:
        """Return True: the weight was floating point before quantization."""
        return True


Weight = Tensor | Quantized


def fingerprint(parameters: Mapping[str, Weight], architecture: str) -> dict[str, Any]:
    """Return the fingerprint as plain data: architecture, parameters (number of elements), shapes, samples, rounding.

    `parameters`: the base's own, by name; `architecture`: the model's class name.
    """
    shapes = sorted((name, list(p.shape)) for name, p in parameters.items() if p.is_floating_point())
    matrices = [name for name, shape in shapes if len(shape) >= 2]
    chosen = [matrices[i * (len(matrices) - 1) // max(MATRICES - 1, 1)] for i in range(MATRICES)] if matrices else []
    read = {name: _samples(parameters[name]) for name in dict.fromkeys(chosen) if not parameters[name].is_meta}
    rounding = {name: errors for name, (_, errors) in read.items() if any(errors)}
    return {
        "architecture": architecture,
        "parameters": sum(p.numel() for p in {id(p): p for p in parameters.values()}.values()),  # a tied weight once
        "shapes": hashlib.sha256(repr(shapes).encode()).hexdigest()[:16],
        "samples": {name: samples for name, (samples, _) in read.items()},
        **({"rounding": rounding} if rounding else {}),
    }


def of_components(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Join the fingerprints of a pipeline's components, by name. Their samples have full names, with the component."""
    rounding = {name: row for own in parts.values() for name, row in own.get("rounding", {}).items()}
    return {
        "architecture": " + ".join(own["architecture"] for own in parts.values()),
        "parameters": sum(own["parameters"] for own in parts.values()),
        "shapes": hashlib.sha256(repr([own["shapes"] for own in parts.values()]).encode()).hexdigest()[:16],
        "samples": {name: row for own in parts.values() for name, row in own["samples"].items()},
        **({"rounding": rounding} if rounding else {}),
        "components": {name: {field: own[field] for field in TOTALS} for name, own in parts.items()},
    }


def components_in(value: Any) -> dict[str, dict[str, Any]]:
    """Return the fingerprint of each component in a pipeline's, samples under full names; empty for any other."""
    parts = value.get("components") if is_sound(value) else None
    if not isinstance(parts, Mapping) or not all(
        isinstance(part, Mapping) and part.keys() >= set(TOTALS) for part in parts.values()
    ):
        return {}
    return {
        component: dict(part) | {field: _inside(value[field], component) for field in SAMPLED if field in value}
        for component, part in parts.items()
    }


def _inside(rows: Mapping[str, Any], component: str) -> dict[str, Any]:
    return {name: row for name, row in rows.items() if name.startswith(f"{component}.")}


def differences(expected: Any, parameters: Mapping[str, Weight], architecture: str) -> list[str]:
    """Return the differences between a base and a fingerprint, one line each; empty if there are none.

    `expected`: the fingerprint, from a file; `parameters`, `architecture`: the base's.
    """
    if not is_sound(expected):
        return ["the adapter's fingerprint of its base is damaged"]
    actual = fingerprint(parameters, architecture)
    lines = []
    if expected.get("architecture") != actual["architecture"]:
        lines.append(
            f"architecture: the adapter was trained on {expected.get('architecture')}, this is {actual['architecture']}"
        )
    if expected.get("shapes") != actual["shapes"]:
        lines.append(
            f"shapes of the parameters differ: the adapter's base has {expected['parameters']:,} parameters, this one "
            f"{actual['parameters']:,}"
        )
    for name in expected["samples"]:
        weight = parameters.get(name)
        if weight is None:
            lines.append(f"weights: {name} is not in this model")
        elif weight.is_floating_point() and not weight.is_meta:
            samples, errors = _samples(weight)
            if not alike(expected, {"samples": {name: samples}, "rounding": {name: errors}}, name):
                lines.append(f"weights: {name} holds other values")
    return lines


def alike(first: Mapping[str, Any], second: Mapping[str, Any], name: str) -> bool:
    """Whether two fingerprints' samples of the weight `name` may be of the same base.

    Raises TypeError, ValueError or AttributeError for damaged fingerprints, see `is_sound`.
    """
    a, b = (torch.tensor(each["samples"][name], dtype=torch.float64) for each in (first, second))
    if a.shape != b.shape:
        return False
    largest = float(a.abs().max()) if a.numel() else 0.0
    allowed = ABSOLUTE + OF_LARGEST * largest + RELATIVE * b.abs()
    for each in (first, second):
        errors = each.get("rounding", {}).get(name)
        if errors is not None:
            if len(errors) != len(a):
                return False
            allowed = allowed + torch.tensor(errors, dtype=torch.float64)
    return bool(((a - b).abs() <= allowed).all())  # False for NaN


def needs_quantized(kind: str) -> str:
    """Begin the error for a base that is not quantized as an adapter needs it (`ONLY_ON`)."""
    return (
        f"the adapter started from what quantization ({kind}) lost of the base's weights (LoftQ), so it is right on "
        "weights quantized in that way only"
    )


def rounded_otherwise(known: Any, weights: Mapping[str, Weight]) -> str | None:
    """Return a quantized weight that holds other values than a fingerprint has of it, without allowance for rounding;
    None if none is known to.

    nf4 and fp4 differ, as do blocks of another size. Scales that are quantized too (double quantization) move weights
    by less than `alike` allows, and pass.
    """
    if not is_sound(known):
        return None
    exact = {"samples": known["samples"]}
    known_here = {n: w for n, w in weights.items() if n in exact["samples"] and isinstance(w, Quantized)}
    own = {name: {"samples": {name: _samples(weight)[0]}} for name, weight in known_here.items() if not weight.is_meta}
    return next((name for name, samples in own.items() if not alike(exact, samples, name)), None)


def is_sound(value: Any) -> bool:
    """Whether a value, read from a file, has the structure of a fingerprint."""
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("parameters"), int)
        and _are_rows(value.get("samples"))
        and _are_rows(rounding := value.get("rounding", {}))
        and all(0 <= n < math.inf for row in rounding.values() for n in row)
    )


def _are_rows(value: Any) -> bool:
    """Whether a value maps names to lists of numbers."""
    return isinstance(value, Mapping) and all(
        isinstance(row, list) and all(isinstance(n, int | float) for n in row) for row in value.values()
    )


def sample_positions(count: int) -> list[int]:
    """Return the flat positions of the sampled elements in a tensor of `count` elements: evenly from the first to the
    last.
    """
    return torch.linspace(0, count - 1, SAMPLES, dtype=torch.float64).long().tolist()


def _samples(weight: Weight) -> tuple[list[float], list[float]]:
    """Return the sampled elements and their rounding errors, which are 0 without quantization."""
    at = torch.tensor(sample_positions(weight.numel()))
    if isinstance(weight, Quantized):
        values, errors = weight.read(at)
        return _rounded(values), _rounded(errors)
    flat = weight.detach().flatten()
    return _rounded(flat[at.to(flat.device)].float()), [0.0] * len(at)


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{v:.4g}") for v in values.cpu().tolist()]
