"""LoKr on a live module (Yeh et al. 2024, LyCORIS): the Kronecker product of a small matrix and a large one.

    y = base(x) + s · (W1 ⊗ W2) x        W1: [o1, i1]   W2: [o2, i2, *k]   out = o1·o2, in = i1·i2

W2 is a product W2a W2b of rank r where that is smaller; W1 too with `lokr_both`. s = alpha / r, or 1 if neither is a
product. `lokr_factor` is o1 and i1 where it divides the sizes; by default they are as near to the root as they can be.
W1 (of a product, W1a) is initialized to zero, the others as LoRA's A, as in PEFT.

A linear never builds the product (`ops.kronecker`). A convolution does, in each forward and again in backward.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...adapter.lokr import FIELDS, Lokr, kron_shapes
from ...adapter.tucker import product
from ...config import LoraConfig
from ...errors import TargetError
from ...ops import kronecker
from ..bases import base_of
from ..layer import init_a
from .update import LiveUpdate, check_fits, check_not_packed, device_of, master_dtype, matrix_shape

if TYPE_CHECKING:
    from ..layer import LoraLayer


class LokrFactors(LiveUpdate):
    """One adapter's LoKr factors on one linear or convolution. `t2`: of a loaded adapter in Tucker form."""

    w1: Tensor | None
    w1a: Tensor | None
    w1b: Tensor | None
    w2: Tensor | None
    w2a: Tensor | None
    w2b: Tensor | None
    t2: Tensor | None

    def __init__(
        self, factors: dict[str, Tensor], shape: tuple[int, ...], alpha: float, dropout: float, trainable: bool
    ):
        """`factors`: by name, w1 to t2; `shape`: of the layer's dense weight."""
        super().__init__()
        for name in FIELDS:
            value = factors.get(name)
            self.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=trainable))
        self.shape, self.alpha, self.dropout = shape, alpha, dropout
        own = self._value()
        self.rank, self.scale = own.rank, own.scale

    @classmethod
    def fresh(cls, layer: LoraLayer, name: str, config: LoraConfig, trainable: bool) -> Self:
        _check_layer(layer, name)
        check_not_packed(name, config, "LoKr")
        shape, rank = base_of(layer).shape(layer), config.rank_of(name)
        out, inner = matrix_shape(layer)
        kernel = shape[2:]
        shapes = kron_shapes(out, inner // math.prod(kernel), kernel, rank, config.lokr_factor, config.lokr_both)
        dtype, device = master_dtype(layer), device_of(layer)
        factors = {half: torch.zeros(size, dtype=dtype, device=device) for half, size in shapes.items()}
        for half in factors.keys() - {"w1", "w1a"}:
            init_a(factors[half], config.init, rank)
        # LoKr's files have no rsLoRA: the scale is always alpha / r.
        alpha = config.alpha_of(name) * (math.sqrt(rank) if config.rslora else 1)
        return cls(factors, shape, alpha, config.dropout, trainable)

    @classmethod
    def of(cls, layer: LoraLayer, name: str, value: Lokr, config: LoraConfig, trainable: bool) -> Self:
        _check_layer(layer, name)
        check_fits(layer, name, value, "LoKr")
        shape = base_of(layer).shape(layer)
        dtype, device = master_dtype(layer) if trainable else None, device_of(layer)
        factors = {half: t.detach().to(device, dtype, copy=True) for half, t in value.tensors().items()}
        return cls(factors, shape, value.alpha, config.dropout, trainable)

    def value(self, layer: LoraLayer) -> Lokr:
        return self._value()

    def _value(self) -> Lokr:
        fields: dict[str, Any] = {name: p.detach() for name, p in self._parameters.items() if p is not None}
        return Lokr(self.alpha, **fields, shape=self.shape if len(self.shape) > 2 else None)

    def faster(self, layer: LoraLayer) -> tuple[str, ...]:
        """The factors of products on the output's side. A whole W1 or W2 has none."""
        return tuple(name for name in ("w1a", "w2a") if self._parameters[name] is not None)

    def change(self, layer: LoraLayer, x: Tensor, y0: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        dtype = y0.dtype
        if len(self.shape) == 2:
            return kronecker.apply(x.to(dtype), self._first().to(dtype), self._second(dtype), self.scale)
        if torch.is_grad_enabled():
            return checkpoint(self._convolved, layer, x, dtype, use_reentrant=False, preserve_rng_state=False)
        return self._convolved(layer, x, dtype)

    def _convolved(self, layer: LoraLayer, x: Tensor, dtype: torch.dtype) -> Tensor:
        (second,) = self._second(None, whole=True)
        full = torch.kron(self._first() * self.scale, second)
        return layer.lora_apply(x, full.reshape(self.shape).to(dtype))

    def _first(self) -> Tensor:
        """Return W1 [o1, i1]."""
        if self.w1 is not None:
            return self.w1
        assert self.w1a is not None
        assert self.w1b is not None
        return self.w1a @ self.w1b

    def _second(self, dtype: torch.dtype | None, whole: bool = False) -> tuple[Tensor, ...]:
        """Return W2 as a matrix [o2, i2·k], (W2,) or (W2a, W2b). `whole`: always the former."""
        if self.w2 is not None:
            return (self.w2.flatten(1).to(dtype),)
        assert self.w2a is not None
        assert self.w2b is not None
        if whole or self.t2 is not None:
            return (product(self.w2a, self.w2b, self.t2).flatten(1).to(dtype),)
        return self.w2a.to(dtype), self.w2b.to(dtype)

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name}={list(p.shape)}" for name, p in self._parameters.items() if p is not None)
        return f"rank={self.rank}, alpha={self.alpha:g}, {shapes}"


Live = LokrFactors


def _check_layer(layer: LoraLayer, name: str) -> None:
    if layer.lora_kind == "embedding":
        raise TargetError(
            f"'{name}' is an embedding, for which LoKr is not defined (nor is it in PEFT)\n"
            "  remove it from the targets, or use variant='lora'"
        )
