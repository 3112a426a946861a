"""What the factor kinds check alike."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import AdapterError


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def check_alpha(module: str, alpha: float) -> None:
    if not (alpha > 0 and math.isfinite(alpha)):
        raise AdapterError(f"adapter factors of '{module}': alpha is {alpha}; expected a positive number")


def check_parts(module: str, tensors: Mapping[str, Tensor]) -> None:
    """Floating point, at least two axes, none empty, all finite; or AdapterError."""
    for name, tensor in tensors.items():
        where = f"adapter factors of '{module}': {name}"
        if not tensor.is_floating_point() or tensor.element_size() < 2:  # torch has no arithmetic for 8 bits
            raise AdapterError(f"{where} has dtype {tensor.dtype}; expected a floating-point type of 16 bits or more")
        if tensor.dim() < 2 or 0 in tensor.shape:
            raise AdapterError(f"{where} has shape {list(tensor.shape)}; expected at least two axes, none of them empty")
        if not tensor.is_meta and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise AdapterError(
                f"{where} holds {bad} values that are not finite (NaN or infinity): the training diverged or the file is damaged"
            )
