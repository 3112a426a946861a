"""PEFT's AdaLoRA, read as the LoRA that it is (Zhang et al. 2023): the singular values go into B.

    ΔW = alpha / (init_r + 1e-5) · B diag(E) A        A: [r, in]   B: [out, r]   E: [r, 1]

r is each module's own, cut from init_r; the scale stays that of init_r, as in PEFT's forward.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.lora import Factors
from ..errors import AdapterError

KIND = "ADALORA"
EPSILON = 1e-5  # which PEFT adds to init_r
_E = re.compile(r"(?P<module>.+)\.lora_E(\.[^.]+)?")
_RAW = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(\.[^.]+)?")


def as_lora(values: Mapping[str, Any]) -> dict[str, Any]:
    """The config's fields as a LoraConfig's: the rank it began with, no pattern of kept singular values."""
    return {**values, "peft_type": "LORA", "r": values.get("init_r") or 12, "rank_pattern": None, "alpha_pattern": None}


def taken_apart(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], where: Path
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """(module -> its factors, the other tensors). AdapterError for a module without all three tensors."""
    parts: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _E.fullmatch(key)
        raw = _RAW.fullmatch(key) if match is None else None
        if match is not None:
            parts.setdefault(match["module"], {})["E"] = tensor
        elif raw is not None:
            parts.setdefault(raw["module"], {})[raw["half"]] = tensor
        else:
            rest[key] = tensor
    first = values.get("init_r") or 12
    alpha = values.get("lora_alpha", 8)
    if not isinstance(first, int | float) or not isinstance(alpha, int | float) or not first > 0:
        raise AdapterError(f"{where}: init_r is {first!r} and lora_alpha {alpha!r}; expected positive numbers")
    scale = (alpha if alpha > 0 else first) / (first + EPSILON)
    return {m: _factors(m, found, scale, bool(values.get("fan_in_fan_out")), where) for m, found in parts.items()}, rest


def _factors(module: str, found: Mapping[str, Tensor], scale: float, transposed: bool, where: Path) -> Factors:
    missing = [half for half in "ABE" if half not in found]
    if missing:
        raise AdapterError(f"{where}: '{module}' has no lora_{missing[0]}; AdaLoRA has lora_A, lora_B and lora_E")
    A, B, E = found["A"], found["B"], found["E"]
    rank = A.shape[0] if A.dim() == 2 else -1
    if A.dim() != 2 or B.dim() != 2 or B.shape[1] != rank or E.numel() != rank:
        raise AdapterError(
            f"{where}: '{module}' has A {list(A.shape)}, B {list(B.shape)} and E {list(E.shape)}; expected [r, in], "
            "[out, r] and [r, 1]"
        )
    if rank == 0:  # all of its singular values were pruned: it changes nothing
        A, B, E, rank = A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1), E.new_zeros(1, 1), 1
    return Factors(
        A, B * E.reshape(1, -1).to(torch.promote_types(B.dtype, E.dtype)), scale * rank, transposed=transposed
    )
