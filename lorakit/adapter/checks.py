"""Checks and casts that all kinds of update share."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import AdapterError


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor without gradients, in float32 (float64 stays)."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite. A tensor without values (on "meta") counts as finite."""
    if tensor.is_meta:
        return True
    # One sum tells, 16 times as fast as looking at each element; only a sum that overflows leaves it open.
    total = tensor.detach().sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).item()
    return math.isfinite(total) or bool(torch.isfinite(tensor).all())


def narrowed(tensor: Tensor, dtype: torch.dtype | None, what: str) -> Tensor:
    """Return the tensor in `dtype` (None: unchanged). Raises AdapterError if a finite value is too large for it; `what`
    names the tensor in that error.
    """
    if dtype is None or not tensor.is_floating_point():
        return tensor
    moved = tensor.to(dtype)
    if not all_finite(moved) and all_finite(tensor):
        raise _too_large(what, float(tensor.abs().max()), dtype)
    return moved


def multiplied(tensor: Tensor, weight: float, module: str) -> Tensor:
    """Return `weight` · tensor, computed in float32 (float64 stays) and cast back to the tensor's dtype. Raises
    AdapterError as in `narrowed`.
    """
    return narrowed(wide(tensor) * weight, tensor.dtype, f"'{module}' times {weight:g}")


def _too_large(what: str, largest: float, dtype: torch.dtype) -> AdapterError:
    fix = (
        "bf16 and fp32 hold up to 3.4e38: dtype=torch.bfloat16 (--dtype bf16) or dtype=torch.float32 (--dtype fp32)"
        if dtype == torch.float16
        else "the scale is too large for any floating-point type: was alpha or a weight mistyped?"
    )
    name = str(dtype).removeprefix("torch.")
    return AdapterError(
        f"{what}: values up to {largest:.3g} are too large for {name}, which holds up to "
        f"{torch.finfo(dtype).max:.3g}\n"
        f"  {fix}"
    )


def check_alpha(module: str, alpha: float) -> None:
    """Raise AdapterError unless alpha is a positive, finite number."""
    if not (alpha > 0 and math.isfinite(alpha)):
        raise AdapterError(f"adapter factors of '{module}': alpha is {alpha}; expected a positive number")


def check_tensors(module: str, tensors: Mapping[str, Tensor], axes: int = 2) -> None:
    """Raise AdapterError unless all tensors are floating point with 16 bits or more, have at least `axes` axes, none of
    them empty, and no NaN or infinity.
    """
    for name, tensor in tensors.items():
        where = f"adapter factors of '{module}': {name}"
        if not tensor.is_floating_point() or tensor.element_size() < 2:  # torch has no arithmetic for 8 bits
            raise AdapterError(f"{where} has dtype {tensor.dtype}; expected a floating-point type of 16 bits or more")
        if tensor.dim() < axes or 0 in tensor.shape:
            least = {1: "one axis", 2: "two axes", 3: "three axes"}[axes]
            raise AdapterError(f"{where} has shape {list(tensor.shape)}; expected at least {least}, none of them empty")
        if not all_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            # Diverged training gives NaN; infinities alone are values that overflowed fp16.
            overflowed = tensor.dtype == torch.float16 and not torch.isnan(tensor).any()
            why = (
                "all of them infinite: values beyond 65504 were written in fp16, or trained in it\n"
                "  make the file again in bf16 or fp32"
                if overflowed
                else "the training diverged or the file is damaged"
            )
            raise AdapterError(f"{where} holds {bad} values that are not finite (NaN or infinity): {why}")
