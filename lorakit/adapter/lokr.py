"""LoKr's factors of one module, as a value (LyCORIS, Yeh et al. 2024, section 4).

    ΔW = s · W1 ⊗ W2        W1: [o1, i1]   W2: [o2, i2, *k]   out = o1·o2, in = i1·i2

Either may itself be a product, W1a W1b or W2a W2b of rank r (W2 in Tucker form: T ×₁ W2a ×₂ W2b). s = alpha / r, and 1 if neither is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AdapterError
from .checks import check_alpha, check_parts, wide
from .update import Update


@dataclass(frozen=True)
class Kronecker(Update):
    alpha: float
    w1: Tensor | None = None
    w1a: Tensor | None = None
    w1b: Tensor | None = None
    w2: Tensor | None = None
    w2a: Tensor | None = None
    w2b: Tensor | None = None
    t2: Tensor | None = None
    shape: tuple[int, ...] | None = None  # of the weight, if it is known to be other than [out, in]

    @property
    def rank(self) -> int:
        """r; the smaller side of W1 where nothing is a product."""
        half = self.w1b if self.w1b is not None else self.w2b
        if half is not None:
            return half.shape[0]
        return min(self.w1.shape) if self.w1 is not None else 0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.w1b is not None or self.w2b is not None else 1.0

    def delta(self, shape: tuple[int, ...] | None = None) -> Tensor:
        """ΔW in float32 (float64 stays), in the weight's shape."""
        first, second = self._first(), self._second()
        # As matrices: [o1, i1] ⊗ [o2, i2·k] has the order of numbers that the convolution's [o1·o2, i1·i2, *k] has.
        full = torch.kron(first, second.flatten(1)).mul_(self.scale)
        shape = shape or self.shape
        if shape is None and second.dim() > 2:
            shape = (full.shape[0], first.shape[1] * second.shape[1], *second.shape[2:])
        return full.reshape(shape) if shape else full

    def check(self, module: str) -> None:
        """Raise AdapterError if these cannot be an update."""
        check_alpha(module, self.alpha)
        check_parts(module, self.tensors())
        for name, whole, a, b in (("w1", self.w1, self.w1a, self.w1b), ("w2", self.w2, self.w2a, self.w2b)):
            if (whole is None) == (a is None or b is None) or (a is None) != (b is None):
                raise AdapterError(f"adapter factors of '{module}': expected lokr_{name}, or lokr_{name}_a with lokr_{name}_b")
            tucker = name == "w2" and self.t2 is not None
            if a is not None and b is not None and (a.dim() != 2 or (a.shape[0 if tucker else 1] != b.shape[0])):
                raise AdapterError(
                    f"adapter factors of '{module}': {name}_a {list(a.shape)} and {name}_b {list(b.shape)} do not fit together"
                )

    def _first(self) -> Tensor:
        if self.w1 is not None:
            return wide(self.w1)
        assert self.w1a is not None
        assert self.w1b is not None
        return wide(self.w1a) @ wide(self.w1b)

    def _second(self) -> Tensor:
        if self.w2 is not None:
            return wide(self.w2)
        assert self.w2a is not None
        assert self.w2b is not None
        if self.t2 is not None:
            return torch.einsum("ij...,ip,jr->pr...", wide(self.t2), wide(self.w2a), wide(self.w2b))
        return (wide(self.w2a) @ wide(self.w2b.flatten(1))).reshape(self.w2a.shape[0], *self.w2b.shape[1:])
