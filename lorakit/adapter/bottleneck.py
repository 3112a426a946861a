"""A bottleneck adapter behind one module, as a value (Houlsby et al. 2019, section 2).

    y = y0 + s · (U f(D n(y0) + c) + b)     y0: the module's output   D: [r, out]   c: [r]   U: [out, r]   b: [out]

f is the non-linearity; n is a LayerNorm of the adapter's own (AdapterL, Lin et al. 2020), or nothing. No change of W
has this effect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor

from ..errors import AdapterError
from .checks import check_tensors
from .lora import Factors, FactorShapes
from .update import Read, Rows, Update

_WHY = "has a bottleneck adapter, whose non-linearity no change of the weight expresses"


@dataclass(frozen=True)
class Bottleneck(Update):
    """`down`: D; `down_bias`: c; `up`: U; `up_bias`: b; `activation`: f's name; `factor`: s; `norm`, `norm_bias`:
    of its own LayerNorm, both or none.
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    activation: str = "relu"
    factor: float = 1.0
    norm: Tensor | None = None
    norm_bias: Tensor | None = None

    @property
    def variant(self) -> str:
        return "bottleneck"

    @property
    def rank(self) -> int:
        """The size of the bottleneck."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.factor

    @property
    def needs_base(self) -> bool:
        """True: what it adds depends on the module's output."""
        return True

    def check(self, module: str) -> None:
        check_tensors(module, self.tensors(), 1)
        rank, out = self.down.shape[0], self.up.shape[0]
        expected = {"down": [rank, out], "down_bias": [rank], "up": [out, rank], "up_bias": [out]}
        expected |= {"norm": [out], "norm_bias": [out]} if (self.norm, self.norm_bias) != (None, None) else {}
        found = {name: list(t.shape) for name, t in self.tensors().items()}
        if found != expected:
            raise AdapterError(f"adapter factors of '{module}': a bottleneck of {found}; expected {expected}")

    def unmergeable(self) -> str | None:
        return f"{_WHY}\n  keep the adapter beside its base"

    def is_zero(self) -> bool:
        return not (self.up.any() or self.up_bias.any())

    def times(self, weight: float, module: str) -> Bottleneck:
        raise AdapterError(
            f"'{module}' {_WHY}: there is no multiple of one\n  activate the adapter with a weight instead"
        )

    # There is no ΔW

    def weight_shape(self) -> tuple[int, ...]:
        """[out, 1]: it does not depend on the module's inputs."""
        return self.up.shape[0], 1

    def delta(self, shape: tuple[int, ...] | None = None) -> Tensor:
        self._refuse("the module")

    def without_base(self) -> Update:
        """s · U D, which the adapter would apply to the module's output without its non-linearity, biases and norm."""
        return Factors(self.down, self.up, self.rank * self.factor)

    def factor_shapes(self, module: str) -> FactorShapes:
        self._refuse(f"'{module}'")

    def rows(
        self, shape: tuple[int, ...], transposed: bool = False, weight: float = 1.0, read: Read | None = None
    ) -> Rows:
        self._refuse("the module")

    def _refuse(self, module: str) -> NoReturn:
        raise AdapterError(f"{module} {_WHY}\n  keep the adapter beside its base")
