"""Weights quantized by torchao: an ordinary nn.Linear whose weight is one of its tensor classes.

Such a tensor claims the dtype from before and can dequantize itself. Its integers have a scale per block of rows and
columns:

    W ≈ (q − zero) · scale[row // block[0], column // block[1]]
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base_weight import BaseWeight, QuantizedTensorWeight, refuse_activations, weight_of

# Half the distance between adjacent float8 numbers, relative to them: 3 bits of mantissa, and 2.
_FLOAT8 = {torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3}


class TorchAo(QuantizedTensorWeight):
    """A tensor class of torchao as the weight. It can be dequantized; the forward is the library's."""

    quantization: ClassVar[str | None] = "torchao"

    def owns(self, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        return (
            weight is not None
            and type(weight).__module__.partition(".")[0] == "torchao"
            and hasattr(weight, "dequantize")
        )

    def sample(self, module: nn.Module, at: Tensor) -> tuple[Tensor, Tensor]:
        at, W, weight = at.to(self.device(module)), self.dense(module).float(), weight_of(module)
        values = W.flatten()[at]
        return values, _errors(weight, W, values, at)

    def check(self, module: nn.Module, name: str, trainable: bool) -> None:
        if trainable and getattr(weight_of(module), "act_quant_kwargs", None) is not None:
            refuse_activations(name, self.quantization)


def _errors(weight: Any, W: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """Return the largest rounding error of the values at flat positions `at` of W."""
    qdata, scale, block = (getattr(weight, name, None) for name in ("qdata", "scale", "block_size"))
    if isinstance(scale, Tensor) and isinstance(qdata, Tensor) and block is not None and W.dim() == 2:
        size_in, block = W.shape[1], (max(block[0], 1), max(block[1], 1))
        per_row = -(-size_in // block[1])
        step = scale.flatten()[at // size_in // block[0] * per_row + at % size_in // block[1]].float().abs()
        if not qdata.dtype.is_floating_point:
            return step / 2
        if qdata.dtype in _FLOAT8:
            return values.abs() * _FLOAT8[qdata.dtype] + step * 2**-10
    # No block of a row reaches farther than the row; with four bits or more it has seven codes on a side.
    return W.abs().amax(-1).flatten()[at // W.shape[-1]] / 14


KINDS: tuple[BaseWeight, ...] = (TorchAo(),)
