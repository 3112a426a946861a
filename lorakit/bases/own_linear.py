"""Linears with the packed weights of GPTQ and AWQ checkpoints, in plain torch: no kernel, no other library.

    y = x Wᵀ + b        W: [out, in], dequantized in each forward, and again in each backward

The dense weight is never kept: between forward and backward only the packed tensors are. They are buffers with the
names that the checkpoint's files have, so that a saved model is the checkpoint again, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LorakitError
from ..ops.quantized import awq, gptq
from ..ops.quantized.int32 import WORD

Dequantize = Callable[[Mapping[str, Tensor], Any], Tensor]


class FrozenQuantLinear(nn.Module):
    """A linear whose packed weight cannot be trained. `was_conv1d`: whether it stands for transformers' Conv1D, whose
    weight is transposed; `dtype`: the model's, which `to` changes.

    Its scales keep their dtype whatever the model is converted to.
    """

    codec: ClassVar[ModuleType]  # a file of `ops.quantized`
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self, tensors: Mapping[str, Tensor], settings: Any, was_conv1d: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        """`tensors`: as in the files, perhaps on "meta"; `dtype`: the model's, None for the scales'. Raises
        LorakitError if the tensors do not fit together.
        """
        super().__init__()
        self.dtype = tensors["scales"].dtype if dtype is None else dtype
        self.settings, self.was_conv1d = settings, was_conv1d
        self.in_features, self.out_features = self.codec.shapes(tensors, settings)
        for name in self.codec.NAMES:
            self.register_buffer(name, tensors.get(name))
        bias = tensors.get("bias")
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def packed(self) -> dict[str, Tensor]:
        """Return the packed tensors, by their names in files."""
        return {name: t for name in self.codec.NAMES if (t := self._buffers[name]) is not None}

    def dequantized(self) -> Tensor:
        """Return the weight [out, in], float32."""
        return cast(Tensor, self.codec.dequantized(self.packed(), self.settings))

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] in the model's dtype, dequantized at each access, for models that look at a linear's
        weight instead of calling it: T5 converts its hidden states to the dtype of one. It cannot be assigned.
        """
        return self.dequantized().to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out], in x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        packed = self.packed()
        y = _Linear.apply(x, self.codec.dequantized, self.settings, tuple(packed), *packed.values())
        return y if bias is None else y + bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.settings}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != before.dtype:
            self.scales = before.to(self.scales.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


class GptqLinear(FrozenQuantLinear):
    """See `ops.quantized.gptq`."""

    codec: ClassVar[ModuleType] = gptq
    settings: gptq.Settings


class AwqLinear(FrozenQuantLinear):
    """See `ops.quantized.awq`."""

    codec: ClassVar[ModuleType] = awq
    settings: awq.Settings


KINDS: dict[str, type[FrozenQuantLinear]] = {"gptq": GptqLinear, "awq": AwqLinear}  # by a config's quant_method


def settings_of(how: Mapping[str, Any], tensors: Mapping[str, Tensor], size_in: int) -> Any:
    """Return the settings of one module's weight. `how`: the model's `quantization_config`; `tensors`: the module's.

    Raises LorakitError for a layout that cannot be read, and if the module has another number of bits without a rule
    for that in `how`.
    """
    settings = KINDS[how["quant_method"]].codec.Settings.of(how)
    if how["quant_method"] != "gptq":
        return settings
    bits = tensors["qweight"].shape[0] * WORD / size_in
    if bits != settings.bits and (not how.get("dynamic") or bits not in gptq.BITS):
        raise LorakitError(
            f"qweight is {list(tensors['qweight'].shape)}: {bits:g} bits for each of {size_in} inputs, expected "
            f"{settings.bits} (quantization_config.bits)"
        )
    groups = tensors["scales"].shape[0]
    size = settings.group_size if settings.group_size > 0 else size_in
    if math.ceil(size_in / size) != groups:
        size = math.ceil(size_in / groups)
    return gptq.Settings(int(bits), size, settings.symmetric, settings.plus_one)


class _Linear(torch.autograd.Function):
    """x Wᵀ and g W, with W dequantized in each of them."""

    @staticmethod
    def forward(x: Tensor, dequantize: Dequantize, settings: Any, names: tuple[str, ...], *packed: Tensor) -> Tensor:
        W = dequantize(dict(zip(names, packed, strict=True)), settings)
        return F.linear(x, W.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.dequantize, ctx.settings, ctx.names, *packed = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(*packed)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        packed = ctx.saved_tensors
        W = ctx.dequantize(dict(zip(ctx.names, packed, strict=True)), ctx.settings)
        return (g @ W.to(g.dtype)).to(ctx.dtype), None, None, None, *(None for _ in packed)
