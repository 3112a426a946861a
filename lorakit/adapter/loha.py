"""LoHa's factors of one module, as a value (Hyeon-Woo et al. 2022, FedPara; LyCORIS, Yeh et al. 2024, section 4).

    ΔW = s · (W1a W1b) ∘ (W2a W2b)        W1a, W2a: [out, r]   W1b, W2b: [r, in·k...]   s = alpha / r

The product of two matrices of rank r, number by number, has a rank of up to r². In Tucker form (convolutions) each of the two is
T ×₁ Wa ×₂ Wb with T [r, r, *k], Wa [r, out], Wb [r, in].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AdapterError
from .checks import check_alpha, check_parts, wide
from .update import Update


@dataclass(frozen=True)
class Hadamard(Update):
    w1a: Tensor
    w1b: Tensor
    w2a: Tensor
    w2b: Tensor
    alpha: float
    t1: Tensor | None = None
    t2: Tensor | None = None
    shape: tuple[int, ...] | None = None  # of the weight, if it is known to be other than [out, in]

    @property
    def rank(self) -> int:
        return self.w1b.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self, shape: tuple[int, ...] | None = None) -> Tensor:
        """ΔW in float32 (float64 stays), in the weight's shape."""
        first, second = _half(self.w1a, self.w1b, self.t1), _half(self.w2a, self.w2b, self.t2)
        full = first.mul_(second).mul_(self.scale)
        shape = shape or self.shape
        return full.reshape(shape) if shape else full

    def check(self, module: str) -> None:
        """Raise AdapterError if these cannot be an update."""
        check_alpha(module, self.alpha)
        check_parts(module, self.tensors())
        tucker = (self.t1 is not None, self.t2 is not None)
        for name, a, b, t in (("w1", self.w1a, self.w1b, self.t1), ("w2", self.w2a, self.w2b, self.t2)):
            ranks = (a.shape[0], b.shape[0]) if t is not None else (a.shape[1], b.shape[0])
            expected = tuple(t.shape[:2]) if t is not None else (ranks[1], ranks[1])
            if a.dim() != 2 or b.dim() != 2 or ranks != expected or tucker[0] != tucker[1]:
                core = f" and core {list(t.shape)}" if t is not None else ""
                raise AdapterError(
                    f"adapter factors of '{module}': {name}_a {list(a.shape)} and {name}_b {list(b.shape)}{core} do not fit together"
                )


def _half(a: Tensor, b: Tensor, t: Tensor | None) -> Tensor:
    if t is None:
        return wide(a) @ wide(b)
    return torch.einsum("ij...,ip,jr->pr...", wide(t), wide(a), wide(b))
