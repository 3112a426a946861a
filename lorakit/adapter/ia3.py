"""(IA)³'s update of one module, as a value (Liu et al. 2022, section 3.3): a factor for each output, or each input.

    y = l ∘ (W x + b)     ΔW = (l - 1) ∘ W by rows, and b' = l ∘ b      l: [out]
    y = W (l ∘ x) + b     ΔW = W ∘ (l - 1) by columns                   l: [in], of a feed-forward's output projection

A convolution's inputs and outputs are its channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import AdapterError
from .checks import check_tensors, wide
from .dense import Dense
from .lora import FactorShapes
from .update import Read, Rows, Update, halves_swapped


@dataclass(frozen=True)
class Ia3(Update):
    """`vector`: l; `feedforward`: whether it scales the inputs; `axes`: of the weight, 2 for a linear; `transposed`:
    the weight is stored as [in, out].

    `other`: the size of the side that it does not scale, of a convolution's inputs per group; None if a file does not
    say it. `groups`: of a convolution whose inputs it scales, as far as the weight is known (`on_weight`).
    """

    vector: Tensor
    feedforward: bool = False
    axes: int = 2
    other: int | None = None
    transposed: bool = False
    groups: int = 1

    @property
    def variant(self) -> str:
        return "ia3"

    @property
    def rank(self) -> int:
        """1, that of the vector: (IA)³ has no rank."""
        return 1

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def needs_base(self) -> bool:
        return True

    def check(self, module: str) -> None:
        check_tensors(module, self.tensors(), 1)
        if self.vector.dim() != 1:
            raise AdapterError(
                f"adapter factors of '{module}': (IA)³'s vector has shape {list(self.vector.shape)}; expected one axis"
            )

    def is_zero(self) -> bool:
        return bool((self.vector == 1).all())

    def times(self, weight: float, module: str) -> Ia3:
        raise AdapterError(
            f"'{module}' is an (IA)³, whose factors multiply the base's weight: no multiple of its change is stored\n"
            "  activate the adapter with a weight instead"
        )

    # ΔW by itself

    def weight_shape(self) -> tuple[int, ...]:
        """Its own size, and 1 for the side that it does not scale if that is not known."""
        n, other = self.vector.shape[0], self.other or 1
        sizes = (other, n) if self.feedforward else (n, other)
        return sizes[::-1] if self.transposed else sizes

    @property
    def sizes(self) -> tuple[int, int]:
        n, other = self.vector.shape[0], self.other or 1
        return (other, n) if self.feedforward else (n, other)

    def delta(self, shape: tuple[int, ...] | None = None) -> Tensor:
        raise AdapterError("the change that (IA)³ makes depends on the base's weight: it has no ΔW of its own")

    def without_base(self) -> Update:
        """How far its factors are from 1, as one column or one row."""
        apart = self.vector - 1
        return Dense(apart[None] if self.feedforward else apart[:, None])

    def factor_shapes(self, module: str) -> FactorShapes:
        raise AdapterError(
            f"'{module}' is an (IA)³, which multiplies the base's weight: it has no low-rank factors\n"
            "  merge the adapter into its base first, then extract the change: lorakit merge, lorakit extract"
        )

    # ΔW on a stored weight

    def layout(self, shape: tuple[int, ...], file_transposed: bool = False, conv1d: bool = False) -> bool | None:
        if len(shape) == 2 and (file_transposed or conv1d or self.transposed) and self._is_for(shape[::-1]):
            return True
        return False if self._is_for(shape) and not (self.transposed and shape[0] != shape[-1]) else None

    def _is_for(self, shape: tuple[int, ...]) -> bool:
        if len(shape) < 2:
            return False
        n, (out, size_in) = self.vector.shape[0], shape[:2]
        if not self.feedforward:
            return n == out and self.other in (None, size_in)
        grouped = len(shape) > 2 and n % size_in == 0 and out % (n // size_in) == 0
        return (n == size_in or grouped) and self.other in (None, out)

    def on_weight(self, shape: tuple[int, ...], transposed: bool) -> Ia3:
        out, size_in = shape[1::-1] if transposed else shape[:2]
        if not self.feedforward:
            return replace(self, other=size_in)
        return replace(self, other=out, groups=self.vector.shape[0] // size_in)

    def rows(
        self, shape: tuple[int, ...], transposed: bool = False, weight: float = 1.0, read: Read | None = None
    ) -> Rows:
        apart = (self.factors_on(shape, transposed) - 1) * weight

        def change(rows: slice, block: Tensor) -> Tensor:
            own = apart[rows] if len(apart) > 1 else apart
            return block.to(torch.promote_types(block.dtype, torch.float32)) * own.to(
                torch.promote_types(block.dtype, torch.float32)
            )

        return change

    def factors_on(self, shape: tuple[int, ...], transposed: bool = False) -> Tensor:
        """Return l in float64 as it multiplies a weight of this shape, flattened to [rows, -1]: one column, one row, or
        (inputs of a grouped convolution) a matrix. A bias, [out], is multiplied as a column.
        """
        own = wide(self.vector).double()
        if len(shape) == 1 or self.feedforward == transposed:
            return own[:, None]
        if len(shape) == 2:
            return own[None]
        groups = own.numel() // shape[1]
        by_group = own.view(groups, shape[1]).repeat_interleave(math.prod(shape[2:]), 1)  # [g, in/g · k]
        return by_group.repeat_interleave(shape[0] // groups, 0) if groups > 1 else by_group

    # The module's bias, and some outputs of it

    def bias_update(self) -> Update | None:
        """Itself, as it multiplies the bias too, unless it scales the inputs."""
        return None if self.feedforward else self

    @property
    def needs_bias(self) -> bool:
        return False

    def output_tensors(self) -> dict[str, Tensor] | None:
        return None if self.feedforward else self.tensors()

    def halves_swapped(self) -> Update | None:
        if self.feedforward and self.groups > 1:
            return None if self.groups % 2 else replace(self, vector=halves_swapped(self.vector))
        return self if self.feedforward else super().halves_swapped()
