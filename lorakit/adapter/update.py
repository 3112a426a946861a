"""What every kind of update answers: how the weight of one module is changed, as a value.

    LoRA    ΔW = s · B A                                    lora.py
    DoRA    ΔW = m (W + s · B A) / ‖W + s · B A‖ - W        lora.py, with a magnitude
    LoHa    ΔW = s · (W1a W1b) ∘ (W2a W2b)                  loha.py
    LoKr    ΔW = s · W1 ⊗ W2                                lokr.py
    whole   ΔW itself                                       dense.py

A kind is a frozen dataclass of tensors and numbers in a file of its own. What is written out here is the same for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor


@dataclass(frozen=True)
class Update(ABC):
    """One module's update."""

    @property
    @abstractmethod
    def rank(self) -> int: ...

    @property
    @abstractmethod
    def scale(self) -> float: ...

    @property
    def parameters(self) -> int:
        """How many elements it holds."""
        return sum(t.numel() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the names of their fields."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        """The same update with `change(name, tensor)` in place of each tensor."""
        changed: dict[str, Any] = {name: change(name, t) for name, t in self.tensors().items()}
        return replace(self, **changed)

    @abstractmethod
    def check(self, module: str) -> None:
        """Raise AdapterError if this cannot be an update."""

    @abstractmethod
    def delta(self, shape: tuple[int, ...] | None = None) -> Tensor:
        """ΔW in float32 (float64 stays), in the weight's layout. AdapterError where there is none without the weight."""
