"""LoHa on a live module (Hyeon-Woo et al. 2022): the Hadamard product of two pairs of rank r, whose rank is up to r².

    y = base(x) + ΔW x        ΔW = s · (W1a W1b) ∘ (W2a W2b)        s = alpha / r
    W1a, W2a: [out, r]   W1b, W2b: [r, in·k]

W2b is initialized to zero, the others as LoRA's A. There is no equivalent pair of low-rank matrices, so ΔW is computed
in each forward, as PEFT and LyCORIS do: r multiplications per weight element, which is little for a batch of many
tokens and much for a single one. `merge` before generating. x and the factors are saved for backward; ΔW is recomputed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...adapter.loha import Loha
from ...adapter.tucker import product
from ...config import LoraConfig
from ...errors import TargetError
from ..bases import base_of
from ..layer import init_a
from .update import LiveUpdate, check_fits, check_not_packed, device_of, master_dtype, matrix_shape

if TYPE_CHECKING:
    from ..layer import LoraLayer


class LohaFactors(LiveUpdate):
    """One adapter's LoHa factors on one linear or convolution. `t1`, `t2`: of a loaded adapter in Tucker form."""

    w1a: Tensor
    w1b: Tensor
    w2a: Tensor
    w2b: Tensor
    t1: Tensor | None
    t2: Tensor | None

    def __init__(
        self,
        factors: dict[str, Tensor],
        shape: tuple[int, ...],
        rank: int,
        alpha: float,
        dropout: float,
        trainable: bool,
    ):
        """`factors`: by name, w1a to t2; `shape`: of the layer's dense weight."""
        super().__init__()
        for name in ("w1a", "w1b", "w2a", "w2b", "t1", "t2"):
            value = factors.get(name)
            self.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=trainable))
        self.shape, self.rank, self.alpha, self.dropout = shape, rank, alpha, dropout

    @classmethod
    def fresh(cls, layer: LoraLayer, name: str, config: LoraConfig, trainable: bool) -> Self:
        _check_layer(layer, name)
        check_not_packed(name, config, "LoHa")
        out, size_in = matrix_shape(layer)
        rank, dtype, device = config.rank_of(name), master_dtype(layer), device_of(layer)
        shapes = {"w1a": (out, rank), "w1b": (rank, size_in), "w2a": (out, rank), "w2b": (rank, size_in)}
        factors = {half: torch.zeros(shape, dtype=dtype, device=device) for half, shape in shapes.items()}
        for half in ("w1a", "w1b", "w2a"):
            init_a(factors[half], config.init, rank)
        # LoHa's files have no rsLoRA: the scale is always alpha / r.
        alpha = config.alpha_of(name) * (math.sqrt(rank) if config.rslora else 1)
        return cls(factors, base_of(layer).shape(layer), rank, alpha, config.dropout, trainable)

    @classmethod
    def of(cls, layer: LoraLayer, name: str, value: Loha, config: LoraConfig, trainable: bool) -> Self:
        _check_layer(layer, name)
        check_fits(layer, name, value, "LoHa")
        shape = base_of(layer).shape(layer)
        dtype, device = master_dtype(layer) if trainable else None, device_of(layer)
        factors = {half: t.detach().to(device, dtype, copy=True) for half, t in value.tensors().items()}
        return cls(factors, shape, value.rank, value.alpha, config.dropout, trainable)

    def value(self, layer: LoraLayer) -> Loha:
        factors = {name: p.detach() for name, p in self._parameters.items() if p is not None}
        kernel = len(self.shape) > 2 and self.t1 is None
        return Loha(**factors, alpha=self.alpha, shape=self.shape if kernel else None)

    def faster(self, layer: LoraLayer) -> tuple[str, ...]:
        """The factors on the output's side."""
        return ("w1a", "w2a")

    def change(self, layer: LoraLayer, x: Tensor, y0: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        if torch.is_grad_enabled():
            return checkpoint(self._applied, layer, x, y0.dtype, use_reentrant=False, preserve_rng_state=False)
        return self._applied(layer, x, y0.dtype)

    def _applied(self, layer: LoraLayer, x: Tensor, dtype: torch.dtype) -> Tensor:
        scale = self.alpha / self.rank
        full = product(self.w1a, self.w1b, self.t1) * product(self.w2a, self.w2b, self.t2) * scale
        full = full.T if layer.lora_transposed else full
        return layer.lora_apply(x, full.reshape(self.shape).to(dtype))

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, W1={list(self.w1a.shape)}·{list(self.w1b.shape)}"


Live = LohaFactors


def _check_layer(layer: LoraLayer, name: str) -> None:
    if layer.lora_kind == "embedding":
        raise TargetError(
            f"'{name}' is an embedding, for which LoHa is not defined (nor is it in PEFT)\n"
            "  remove it from the targets, or use variant='lora'"
        )
