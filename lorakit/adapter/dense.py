"""A dense update of one module, as a value: ΔW itself, and the bias's change if there is one (LyCORIS' "diff")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AdapterError
from .checks import check_tensors, multiplied, wide
from .lora import FactorShapes
from .update import Read, Rows, Update, as_matrix_shape, halves_swapped


@dataclass(frozen=True)
class Dense(Update):
    """`weight`: ΔW in the weight's own shape; [dim] for a norm. `bias`: the bias's change, [out]."""

    weight: Tensor | None
    bias: Tensor | None = None

    @property
    def variant(self) -> str:
        return "dense"

    @property
    def rank(self) -> int:
        """The largest rank that a matrix of this shape can have."""
        return min(self.weight.flatten(1).shape) if self.weight is not None and self.weight.dim() > 1 else 1

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def sizes(self) -> tuple[int, int]:
        if self.weight is None:
            return (self.bias.shape[0] if self.bias is not None else 0), 1
        return super().sizes

    @property
    def is_matrix(self) -> bool:
        return self.weight is not None and self.weight.dim() > 1

    @property
    def changes_weight(self) -> bool:
        return self.weight is not None

    @property
    def changes_bias(self) -> bool:
        return self.bias is not None

    def check(self, module: str) -> None:
        if not self.tensors():
            raise AdapterError(f"adapter factors of '{module}': a dense update without a tensor")
        check_tensors(module, self.tensors(), 1)

    def is_zero(self) -> bool:
        return not any(bool(t.any()) for t in self.tensors().values())

    def times(self, weight: float, module: str) -> Dense:
        return self.map(lambda _, t: multiplied(t, weight, module))

    def weight_shape(self) -> tuple[int, ...]:
        return tuple(self._weight.shape)

    def delta(self, shape: tuple[int, ...] | None = None) -> Tensor:
        return wide(self._weight).reshape(shape or self._weight.shape).clone()

    def matrix(self, transposed: bool = False) -> Tensor:
        """Return ΔW as a matrix: a norm's is one column [dim, 1]; without a ΔW (a bias alone) a single zero [1, 1]."""
        full = wide(self.weight) if self.weight is not None else torch.zeros(1, 1)
        full = full.flatten(1) if full.dim() > 1 else full[:, None]
        return full.T if transposed else full

    def output_tensors(self) -> dict[str, Tensor]:
        return self.tensors()

    def factor_shapes(self, module: str) -> FactorShapes:
        if not self.is_matrix:
            what = "a bias" if self.weight is None else f"a vector of {self.weight.numel()}"
            raise AdapterError(f"'{module}' changes {what}, which has no low-rank factors")
        return FactorShapes.of_shape(self.weight_shape())

    def layout(self, shape: tuple[int, ...], file_transposed: bool = False, conv1d: bool = False) -> bool | None:
        """Return True only if the file stores the transpose: ΔW has the module's own layout, also of a Conv1D."""
        own = self.weight_shape()
        if file_transposed and shape == own[::-1]:
            return True
        return False if as_matrix_shape(own) == as_matrix_shape(shape) else None

    def rows(
        self, shape: tuple[int, ...], transposed: bool = False, weight: float = 1.0, read: Read | None = None
    ) -> Rows:
        full = wide(self._weight)
        full = (full.T if transposed else full).reshape(shape[0], -1)
        return lambda rows, _: full[rows] * weight

    @property
    def _weight(self) -> Tensor:
        if self.weight is None:
            raise AdapterError("this update changes a bias only: it has no ΔW")
        return self.weight


def with_halves_swapped(update: Update) -> Update:
    """Return the same update for a weight stored with the second half of its rows first: of its own kind, or dense
    where the kind's tensors cannot express it. Raises AdapterError if it must be dense and ΔW depends on the weight.
    """
    own = update.halves_swapped()
    return Dense(halves_swapped(update.delta())) if own is None else own
