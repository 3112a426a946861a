"""Weights quantized by optimum-quanto: a `QLinear` with one of its tensor classes as the weight.

8 bits     W ≈ data · scale[row]                        int8, or float8
2, 4 bits  W ≈ data · scale[group] − shift[group]       groups of consecutive elements of a row
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base_weight import BaseWeight, QuantizedTensorWeight, refuse_activations, weight_of


class Quanto(QuantizedTensorWeight):
    """A frozen module. Before `freeze` its weight is an ordinary one, and only its forward rounds it."""

    quantization: ClassVar[str | None] = "quanto"

    def owns(self, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        return weight is not None and type(weight).__module__.startswith("optimum.quanto.")

    def sample(self, module: nn.Module, at: Tensor) -> tuple[Tensor, Tensor]:
        at, W, weight = at.to(self.device(module)), self.dense(module).float(), weight_of(module)
        values, size_in = W.flatten()[at], W[0].numel()
        scale, data = getattr(weight, "_scale", None), getattr(weight, "_data", None)
        if scale is None or weight.axis != 0:
            # No group of a row reaches farther than the row; with two bits it has one code on a side.
            return values, W.flatten(1).abs().amax(1)[at // size_in] / 2
        step = scale.flatten().float()[at // (getattr(weight, "_group_size", None) or size_in)].abs()
        if isinstance(data, Tensor) and data.dtype.is_floating_point:
            info = torch.finfo(data.dtype)
            return values, values.abs() * info.eps / 2 + step * info.smallest_normal
        return values, step / 2

    def check(self, module: Any, name: str, trainable: bool) -> None:
        if trainable and getattr(module, "activation_qtype", None) is not None:
            refuse_activations(name, self.quantization)


KINDS: tuple[BaseWeight, ...] = (Quanto(),)
