"""Weights quantized by HQQ (Badri and Shaji 2023): an `HQQLinear` with the parameter W_q and a dictionary `meta`.

W ≈ (q − zero[g]) · scale[g]        groups g of `group_size` consecutive elements (axis 1), or of elements
                                    n / group_size apart (axis 0); n: the number of elements
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base_weight import BaseWeight, QuantizedWeight


class Hqq(QuantizedWeight):
    """An `HQQLinear`. It is no nn.Linear, and its bias may be a plain attribute."""

    quantization: ClassVar[str | None] = "HQQ"

    def owns(self, module: nn.Module) -> bool:
        return any(cls.__name__ == "HQQLinear" for cls in type(module).__mro__) and bool(getattr(module, "meta", None))

    def is_linear(self, module: nn.Module) -> bool:
        return True

    def stored(self, module: nn.Module) -> tuple[str, ...]:
        return ("W_q",)

    def shape(self, module: Any) -> tuple[int, ...]:
        return tuple(module.meta["shape"])

    def dtype(self, module: Any) -> torch.dtype:
        dtype: torch.dtype = module.compute_dtype
        return dtype

    def device(self, module: Any) -> torch.device:
        device: torch.device = module.W_q.device
        return device

    def dense(self, module: Any) -> Tensor:
        with torch.no_grad():
            dense: Tensor = module.dequantize()
        return dense.detach()

    def sample(self, module: Any, at: Tensor) -> tuple[Tensor, Tensor]:
        at, W, meta = at.to(self.device(module)), self.dense(module).float(), module.meta
        values, scale = W.flatten()[at], meta.get("scale")
        if scale is None:  # quantized itself, or moved off the device
            return values, W.abs().amax(1)[at // W.shape[1]] / 2
        step = scale.flatten().float().abs()
        group = at % len(step) if meta["axis"] == 0 else at // (W.numel() // len(step))
        # HQQ moves the zero point to fit most of a group, so that its ends may be cut by more than half a step (0.6 was
        # the most in 2 to 8 bits, normal weights).
        return values, step[group]


KINDS: tuple[BaseWeight, ...] = (Hqq(),)
