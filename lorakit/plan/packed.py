"""Stand-ins for quantized linears, so that a step on shapes has the memory of a run on a quantized base.

    forward     y = x Ŵᵀ + b        Ŵ [out, in] is made for this, in the precision to multiply in, and freed again
    backward    g Ŵ                 and again

What they keep throughout is the packed weight. GPTQ and AWQ, which lorakit dequantizes itself, make Ŵ in float32 and
convert it. bitsandbytes' int8 keeps the input of each linear until its backward, though it needs only Ŵ there; torchao
keeps the Ŵ of all linears, as its forward is an ordinary product that autograd records.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bases.quantize import stored_linears
from ..bases.stored_weights import Storage


@dataclass(frozen=True)
class Packing:
    """How a plan's base is stored."""

    storage: Storage
    trained: tuple[str, ...] = ()  # names of modules that are trained and saved in full

    @property
    def name(self) -> str:
        """What an estimate calls it: "nf4", "gptq"."""
        return self.storage.quantizer or self.storage.method

    @property
    def compute(self) -> torch.dtype | None:
        """The dtype that weights are multiplied in; None for the input's."""
        return None if self.storage.compute is None else getattr(torch, self.storage.compute)


class StandInWeight(nn.Parameter):
    """A frozen weight of another class than an ordinary one's, as quantized ones are: fused modules check for that."""


class PackedLinear(nn.Linear):
    """A linear that holds `packed_bytes` in place of its weight."""

    packed_bytes: int
    packing: Packing

    @classmethod
    def of(cls, module: nn.Module, packing: Packing) -> PackedLinear:
        """Build the stand-in of a linear or a Conv1D on the meta device."""
        weight: Any = module.weight
        rows, columns = weight.shape if isinstance(module, nn.Linear) else weight.T.shape
        self = cls(columns, rows, bias=getattr(module, "bias", None) is not None, device="meta", dtype=weight.dtype)
        self.weight = StandInWeight(self.weight.data, requires_grad=False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        size = packing.storage.size
        assert size is not None
        self.packed_bytes = size(rows, columns, weight.element_size())
        self.packing = packing
        return self.train(module.training)

    @property
    def saved_bytes(self) -> int:
        """The bytes that packing saves."""
        return self.weight.numel() * self.weight.element_size() - self.packed_bytes

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out], in x's dtype."""
        storage, compute = self.packing.storage, self.packing.compute or x.dtype
        own = storage.method in ("gptq", "awq")
        y = _Multiply.apply(x.to(compute), self.weight, self.bias, own, storage.keeps)
        return y.to(x.dtype)


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, in_float32: bool, keeps: str | None
    ) -> Tensor:
        W = _dequantized(weight, x.dtype, in_float32)
        ctx.weight, ctx.in_float32 = weight, in_float32
        ctx.input, ctx.dense = x if keeps == "input" else None, W if keeps == "weight" else None
        return F.linear(x, W, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        W = _dequantized(ctx.weight, g.dtype, ctx.in_float32) if ctx.dense is None else ctx.dense
        return g @ W, None, None, None, None


def _dequantized(weight: Tensor, dtype: torch.dtype, in_float32: bool) -> Tensor:
    if not in_float32:
        return torch.empty_like(weight, dtype=dtype)
    codes, zeros = (torch.empty_like(weight, dtype=torch.float32) for _ in range(2))
    del zeros  # subtracted, the zeros of all groups
    return codes.to(dtype)


def pack(model: nn.Module, packing: Packing) -> int:
    """Put stand-ins, in place, for the linears that the base stores packed, and return how many these are.

    The model is on the meta device.
    """
    linears = stored_linears(model, packing.storage, packing.trained)
    for name, module in linears.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, PackedLinear.of(module, packing))
    return len(linears)
