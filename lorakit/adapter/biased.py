"""An update of a weight beside a change of the module's bias, as a value: PEFT's `lora_bias`, ComfyUI's `diff_b`.

y = (W + ΔW) x + b + d        ΔW: the update it is built on   d: [out]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import AdapterError
from .checks import check_tensors, multiplied
from .lora import FactorShapes
from .update import LowRank, Read, Rows, Update


@dataclass(frozen=True)
class Biased(Update):
    """`inner`: the update of the weight. `bias`: d, the change of the bias.

    Its `factors` are None: who can only hold low-rank factors must not drop the bias.
    """

    inner: Update
    bias: Tensor

    @property
    def variant(self) -> str:
        return "biased"

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def scale(self) -> float:
        return self.inner.scale

    @property
    def needs_base(self) -> bool:
        return self.inner.needs_base

    @property
    def is_matrix(self) -> bool:
        return self.inner.is_matrix

    @property
    def changes_bias(self) -> bool:
        return True

    @property
    def bias_apart(self) -> bool:
        return True

    @property
    def weight_alone(self) -> Update:
        return self.inner

    def with_weight(self, after: Update) -> Update:
        return Biased(after, self.bias)

    @property
    def sizes(self) -> tuple[int, int]:
        return self.inner.sizes

    def tensors(self) -> dict[str, Tensor]:
        """Those of the update of the weight, and `bias`."""
        return {**self.inner.tensors(), "bias": self.bias}

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Biased:
        return Biased(self.inner.map(change), change("bias", self.bias))

    def check(self, module: str) -> None:
        self.inner.check(module)
        check_tensors(module, {"bias": self.bias}, 1)
        if tuple(self.bias.shape) != (self.sizes[0],):
            raise AdapterError(
                f"adapter factors of '{module}': its bias has shape {list(self.bias.shape)}; expected "
                f"[{self.sizes[0]}], one number for each output"
            )

    def unmergeable(self) -> str | None:
        return self.inner.unmergeable()

    def times(self, weight: float, module: str) -> Biased:
        return Biased(self.inner.times(weight, module), multiplied(self.bias, weight, module))

    # ΔW by itself

    def weight_shape(self) -> tuple[int, ...]:
        return self.inner.weight_shape()

    def delta(self, shape: tuple[int, ...] | None = None) -> Tensor:
        return self.inner.delta(shape)

    def without_base(self) -> Update:
        return Biased(self.inner.without_base(), self.bias) if self.needs_base else self

    def low_rank(self) -> LowRank | None:
        return self.inner.low_rank()

    def factor_shapes(self, module: str) -> FactorShapes:
        return self.inner.factor_shapes(module)

    # ΔW on a stored weight

    def layout(self, shape: tuple[int, ...], file_transposed: bool = False, conv1d: bool = False) -> bool | None:
        return self.inner.layout(shape, file_transposed, conv1d)

    def rows(
        self, shape: tuple[int, ...], transposed: bool = False, weight: float = 1.0, read: Read | None = None
    ) -> Rows:
        return self.inner.rows(shape, transposed, weight, read)

    # Some outputs of a module

    def output_tensors(self) -> dict[str, Tensor] | None:
        own = self.inner.output_tensors()
        return None if own is None else {**own, "bias": self.bias}

    @property
    def output_block(self) -> int:
        return self.inner.output_block

    @property
    def outputs_independent(self) -> bool:
        return self.inner.outputs_independent
