"""An ordinary weight: a floating-point tensor, in any module."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ...errors import StateError
from .base_weight import BaseWeight

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Dense:
    """The module's `weight`; in a parametrized module, the one computed from its parameters."""

    quantization: ClassVar[str | None] = None
    parameter: ClassVar[str] = "weight"

    def owns(self, module: nn.Module) -> bool:
        return True

    def is_linear(self, module: nn.Module) -> bool:
        return False  # a class derived from nn.Linear is one anyway

    def stored(self, module: nn.Module) -> tuple[str, ...]:
        return ("weight",)

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        return tuple(self._weight(module).shape)

    def dtype(self, module: nn.Module) -> torch.dtype:
        return self._weight(module).dtype

    def device(self, module: nn.Module) -> torch.device:
        return self._weight(module).device

    def dense(self, module: nn.Module) -> Tensor:
        return self._weight(module).detach()

    def sample(self, module: nn.Module, at: Tensor) -> tuple[Tensor, Tensor]:
        values = self.dense(module).flatten()[at.to(self.device(module))].float()
        return values, torch.zeros_like(values)

    def was_transposed(self, module: nn.Module) -> bool:
        return False

    def writable(self, module: nn.Module, name: str) -> Tensor:
        weight = self._weight(module)
        if self.parameter not in module._parameters:
            raise StateError(
                f"the weight of '{name}' is computed from other parameters (a parametrization such as weight_norm), so "
                "ΔW cannot be added to it\n"
                "  keep the adapter unmerged, or remove the parametrization: "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )
        if weight.is_meta:
            raise StateError(
                f"'{name}' is offloaded, so it cannot be merged here\n"
                "  merge the checkpoint's files instead: lorakit merge BASE ADAPTER OUT"
            )
        if weight.dtype not in _FLOATS:
            raise StateError(
                f"'{name}' has a weight of {weight.dtype} (quantized?), which cannot be merged in place\n"
                "  merge into the unquantized base"
            )
        return weight

    def check(self, module: nn.Module, name: str, trainable: bool) -> None:
        """Do nothing: it can always be adapted."""

    def prepare(self, module: nn.Module) -> None:
        """Do nothing: its forward does not change the storage."""

    def restore(self, module: nn.Module) -> None:
        """Do nothing, as `prepare`."""

    def _weight(self, module: nn.Module) -> Tensor:
        weight = getattr(module, self.parameter)
        assert isinstance(weight, Tensor)
        return weight


KINDS: tuple[BaseWeight, ...] = (Dense(),)
