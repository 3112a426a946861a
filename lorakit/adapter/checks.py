"""What the kinds of update check alike."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import AdapterError


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def narrowed(tensor: Tensor, dtype: torch.dtype | None, what: str) -> Tensor:
    """In this precision (None: as it is). AdapterError where a finite number is too large for it; `what` says where it
    is from.
    """
    if dtype is None or not tensor.is_floating_point():
        return tensor
    moved = tensor.to(dtype)
    if not tensor.is_meta and not torch.isfinite(moved).all() and torch.isfinite(tensor).all():
        raise _too_large(what, float(tensor.abs().max()), dtype)
    return moved


def multiplied(tensor: Tensor, weight: float, module: str) -> Tensor:
    """`weight` · tensor, computed in float32 at least and in the tensor's own precision again."""
    return narrowed(wide(tensor) * weight, tensor.dtype, f"'{module}' times {weight:g}")


def _too_large(what: str, largest: float, dtype: torch.dtype) -> AdapterError:
    wider = "bf16 and fp32 reach to 3.4e38: dtype=torch.bfloat16 (--dtype bf16) or dtype=torch.float32 (--dtype fp32)"
    todo = (
        wider
        if dtype == torch.float16
        else "its strength is beyond all that numbers can hold: was alpha or a weight mistyped?"
    )
    name = str(dtype).removeprefix("torch.")
    return AdapterError(
        f"{what}: numbers up to {largest:.3g} are too large for {name}, which ends at {torch.finfo(dtype).max:.3g}\n"
        f"  {todo}"
    )


def check_alpha(module: str, alpha: float) -> None:
    if not (alpha > 0 and math.isfinite(alpha)):
        raise AdapterError(f"adapter factors of '{module}': alpha is {alpha}; expected a positive number")


def check_tensors(module: str, tensors: Mapping[str, Tensor], axes: int = 2) -> None:
    """Floating point, at least so many axes, none empty, all finite; or AdapterError."""
    for name, tensor in tensors.items():
        where = f"adapter factors of '{module}': {name}"
        if not tensor.is_floating_point() or tensor.element_size() < 2:  # torch has no arithmetic for 8 bits
            raise AdapterError(f"{where} has dtype {tensor.dtype}; expected a floating-point type of 16 bits or more")
        if tensor.dim() < axes or 0 in tensor.shape:
            least = "two axes" if axes == 2 else "one axis"
            raise AdapterError(f"{where} has shape {list(tensor.shape)}; expected at least {least}, none of them empty")
        if not tensor.is_meta and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            # NaN spreads where training goes wrong; infinities alone are what is left of numbers that a narrow
            # precision cannot hold.
            cut = tensor.dtype == torch.float16 and not torch.isnan(tensor).any()
            why = (
                "all of them infinite: numbers beyond 65504 were written in fp16, or trained in it\n"
                "  make the file again in bf16 or fp32"
                if cut
                else "the training diverged or the file is damaged"
            )
            raise AdapterError(f"{where} holds {bad} values that are not finite (NaN or infinity): {why}")
