"""What GPTQ's and AWQ's weights have in common: integers packed into int32 words, in lorakit's own modules
(`bases.own_linear`) and in those of gptqmodel and AutoAWQ.

A library's module is recognized by the names of its classes. Only those are listed whose tensors keep the layout of the
checkpoint's files: other kernels rearrange them, and then only they can read them.

Some of gptqmodel's modules look at their first input. If that needs no gradients, they repack their weight for good,
for a kernel without gradients: trained afterwards, the layers below got gradients that were 83 % off, without a
warning. So their `linear_mode` is set to "train" while adapters are attached.
"""

from __future__ import annotations

from collections.abc import Collection
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...bases.own_linear import FrozenQuantLinear
from ...errors import StateError
from .base_weight import QuantizedWeight

_MODE, _TRAIN, _INFERENCE = "linear_mode", "train", "inference"
_ORIGINAL = "_lora_linear_mode"  # marks a module whose mode was not chosen yet


class PackedWeight(QuantizedWeight):
    """A weight in the layout of a file of `ops.quantized`."""

    codec: ClassVar[ModuleType]
    own: ClassVar[type[FrozenQuantLinear]]
    classes: ClassVar[Collection[str]]  # a library's, see above

    def settings(self, module: Any) -> Any:
        """Return the codec's settings of a library's module."""
        raise NotImplementedError

    def owns(self, module: nn.Module) -> bool:
        return isinstance(module, self.own) or (
            "qweight" in module._buffers and any(cls.__name__ in self.classes for cls in type(module).__mro__)
        )

    def is_linear(self, module: nn.Module) -> bool:
        return True

    def stored(self, module: nn.Module) -> tuple[str, ...]:
        return ()  # in buffers

    def shape(self, module: Any) -> tuple[int, ...]:
        return module.out_features, module.in_features

    def dtype(self, module: Any) -> torch.dtype:
        scales: Tensor = module.scales
        return scales.dtype

    def device(self, module: Any) -> torch.device:
        qweight: Tensor = module.qweight
        return qweight.device

    def dense(self, module: nn.Module) -> Tensor:
        self.check(module, type(module).__name__, trainable=False)
        dense: Tensor = self.codec.dequantized(self._tensors(module), self._settings(module))
        return dense

    def sample(self, module: nn.Module, at: Tensor) -> tuple[Tensor, Tensor]:
        at = at.to(self.device(module))
        errors: Tensor = self.codec.rounding(self._tensors(module), self._settings(module))
        return self.dense(module).flatten()[at], errors.flatten()[at]

    def was_transposed(self, module: nn.Module) -> bool:
        return bool(getattr(module, "was_conv1d", False))

    def check(self, module: nn.Module, name: str, trainable: bool) -> None:
        """Raise StateError for a weight that its library has repacked."""
        if getattr(module, _MODE, None) == _INFERENCE:
            raise StateError(
                f"'{name}' was repacked by gptqmodel when the model was first called without gradients, and no longer "
                "passes any\n  load the base again, and attach the adapter before calling the model"
            )

    def prepare(self, module: nn.Module) -> None:
        if _MODE in module.__dict__ and getattr(module, _MODE) is None:
            module.__dict__[_ORIGINAL] = True
            setattr(module, _MODE, _TRAIN)

    def restore(self, module: nn.Module) -> None:
        if module.__dict__.pop(_ORIGINAL, False):
            setattr(module, _MODE, None)

    def _settings(self, module: nn.Module) -> Any:
        return module.settings if isinstance(module, FrozenQuantLinear) else self.settings(module)

    def _tensors(self, module: nn.Module) -> dict[str, Tensor]:
        return {name: tensor for name in self.codec.NAMES if (tensor := module._buffers.get(name)) is not None}
