"""DoRA's update of one module, as a value (Liu et al. 2024, equation 5): it learns W's magnitude and direction apart.

    W' = m (W + D) / ‖W + D‖        D: the update it is built on, s · B A of a LoRA
    ΔW = W' - W

‖·‖: of each output's row, m: [out, 1]; or of each input's column, m: [1, in·k].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import AdapterError
from .checks import check_tensors
from .lora import Factors, FactorShapes
from .update import Read, Rows, Update


@dataclass(frozen=True)
class Dora(Update):
    """`inner`: the update D of the direction, which needs no base. `magnitude`: m."""

    inner: Update
    magnitude: Tensor

    @property
    def variant(self) -> str:
        return "dora"

    @property
    def live_variants(self) -> tuple[str, ...]:
        return (self.variant, *self.inner.live_variants)

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def scale(self) -> float:
        """The scale of D."""
        return self.inner.scale

    @property
    def parameters(self) -> int:
        return self.inner.parameters + self.magnitude.numel()

    @property
    def parts(self) -> tuple[bool, ...] | None:
        return self.inner.parts

    @property
    def sizes(self) -> tuple[int, int]:
        return self.inner.sizes

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def by_output(self) -> bool:
        """Whether m has one element for each output, and not for each input."""
        return tuple(self.magnitude.shape) == (self.sizes[0], 1)

    def tensors(self) -> dict[str, Tensor]:
        """Return D's tensors and `magnitude`."""
        return {**self.inner.tensors(), "magnitude": self.magnitude}

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Dora:
        return Dora(self.inner.map(change), change("magnitude", self.magnitude))

    @property
    def factors(self) -> Factors | None:
        return self.inner.factors

    def map_factors(self, change: Callable[[Factors], Factors]) -> Dora:
        return replace(self, inner=self.inner.map_factors(change))

    def check(self, module: str) -> None:
        """Raise AdapterError unless D is sound and m is a finite [out, 1] or [1, in·k]."""
        self.inner.check(module)
        check_tensors(module, {"magnitude": self.magnitude})
        out = self.sizes[0]
        inputs = math.prod(self.weight_shape()) // out
        if list(self.magnitude.shape) not in ([out, 1], [1, inputs]):
            raise AdapterError(
                f"adapter factors of '{module}': DoRA's magnitude has shape {list(self.magnitude.shape)}; expected "
                f"{[out, 1]} or {[1, inputs]}"
            )

    def unmergeable(self) -> str | None:
        return self.inner.unmergeable()

    def is_zero(self) -> bool:
        """Return False: m may change the weight where D is zero."""
        return False

    def times(self, weight: float, module: str) -> Dora:
        raise AdapterError(
            f"'{module}' is a DoRA, whose change cannot be multiplied by a weight\n  activate it with a weight instead"
        )

    # ΔW by itself

    def weight_shape(self) -> tuple[int, ...]:
        return self.inner.weight_shape()

    def delta(self, shape: tuple[int, ...] | None = None) -> Tensor:
        raise AdapterError("the change that a DoRA makes depends on the base's weight: it has no ΔW of its own")

    def without_base(self) -> Update:
        return self.inner

    def factor_shapes(self, module: str) -> FactorShapes:
        raise AdapterError(
            f"'{module}' is a DoRA: its change depends on the base's weight, so it cannot be added or cut by itself\n"
            "  merge it into its base first, then extract the change from the result: lorakit merge, lorakit extract"
        )

    # ΔW on a stored weight

    def layout(self, shape: tuple[int, ...], file_transposed: bool = False, conv1d: bool = False) -> bool | None:
        return self.inner.layout(shape, file_transposed, conv1d)

    def rows(
        self, shape: tuple[int, ...], transposed: bool = False, weight: float = 1.0, read: Read | None = None
    ) -> Rows:
        """Compute `weight` · ΔW block by block, as a live model with this weight does.

        Where a norm spans several blocks (outputs of a weight stored as [in, out], or inputs), the weight is read again
        through `read` to add it up.
        """
        change = self.inner.rows(shape, transposed)
        m = self.magnitude.detach().double().flatten()
        if self.by_output != transposed:  # the norm of each stored row lies within its block

            def within(rows: slice, block: Tensor) -> Tensor:
                V = block.double() + change(rows, block)
                return (V * _ratio(m[rows, None], V.norm(dim=1, keepdim=True)) - block) * weight

            return within
        assert read is not None, "a norm across the rows needs the weight once more"
        squares = torch.zeros(m.numel(), dtype=torch.float64, device=m.device)
        for rows, block in read():
            squares += (block.double() + change(rows, block)).square().sum(0)
        ratio = _ratio(m, squares.sqrt())
        return lambda rows, block: ((block.double() + change(rows, block)) * ratio - block) * weight

    # Some outputs of a module

    def output_tensors(self) -> dict[str, Tensor] | None:
        own = self.inner.output_tensors()
        return {**own, "magnitude": self.magnitude} if own is not None and self.by_output else own

    @property
    def outputs_independent(self) -> bool:
        """The norm of an input's column runs over all outputs."""
        return self.by_output


def _ratio(magnitude: Tensor, norm: Tensor) -> Tensor:
    """Return m / ‖W + D‖; 0 for a row of zeros, which has no direction and stays zero."""
    return torch.where(norm > 0, magnitude / norm, 0)
