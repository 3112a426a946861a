"""A whole ΔW of one module, as a value: LyCORIS' "diff", with the bias's change where there is one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AdapterError
from .checks import wide
from .update import Update


@dataclass(frozen=True)
class Dense(Update):
    """`weight`: ΔW in the weight's own shape (also of a norm, [dim]). `bias`: the bias's change."""

    weight: Tensor | None
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """The most that a matrix of this shape can have."""
        return min(self.weight.flatten(1).shape) if self.weight is not None and self.weight.dim() > 1 else 1

    @property
    def scale(self) -> float:
        return 1.0

    def delta(self, shape: tuple[int, ...] | None = None) -> Tensor:
        """ΔW in float32 (float64 stays), in the weight's shape."""
        if self.weight is None:
            raise AdapterError("this update changes a bias only: it has no ΔW")
        return wide(self.weight).reshape(shape or self.weight.shape).clone()

    def check(self, module: str) -> None:
        """Raise AdapterError if this cannot be an update."""
        if not self.tensors():
            raise AdapterError(f"adapter factors of '{module}': a whole update without a tensor")
        for name, tensor in self.tensors().items():
            if not tensor.is_floating_point() or tensor.element_size() < 2 or 0 in tensor.shape or tensor.dim() == 0:
                raise AdapterError(f"adapter factors of '{module}': {name} has shape {list(tensor.shape)} and dtype {tensor.dtype}")
            if not tensor.is_meta and not torch.isfinite(tensor).all():
                raise AdapterError(f"adapter factors of '{module}': {name} holds values that are not finite (NaN or infinity)")
