"""LoRA on a live module: A and B as parameters, which the layer uses (`pair`). Each layer's file gives their shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Self

from torch import Tensor, nn

from ...adapter.lora import Factors
from ...config import LoraConfig, scale_of
from ...errors import AdapterError, StateError
from ...ops.packed import compact_packed
from .update import LiveUpdate, device_of, master_dtype

if TYPE_CHECKING:
    from ..layer import LoraLayer


class LoraFactors(LiveUpdate):
    """One adapter's A and B on one module, with their scale and dropout."""

    gain = None

    def __init__(self, A: Tensor, B: Tensor, alpha: float, rslora: bool, dropout: float, trainable: bool):
        super().__init__()
        self.A = nn.Parameter(A, requires_grad=trainable)
        self.B = nn.Parameter(B, requires_grad=trainable)
        self.alpha, self.rslora, self.dropout = alpha, rslora, dropout
        self.rank = B.shape[-1] if self.is_packed else A.shape[0]
        self.width = A.shape[0]

    @classmethod
    def fresh(cls, layer: LoraLayer, name: str, config: LoraConfig, trainable: bool) -> Self:
        parts = config.parts_of(name)
        if parts is not None and getattr(layer, "lora_parts", None) != parts:
            raise StateError(
                f"'{name}' already has another adapter, so it cannot become a packed projection of {len(parts)} parts\n"
                "  attach the packed adapter first"
            )
        rank = config.rank_of(name)
        A, B = layer.lora_fresh(
            layer.lora_shapes(rank, parts), rank, config.init, master_dtype(layer), device_of(layer)
        )
        return cls(A, B, config.alpha_of(name), config.rslora, config.dropout, trainable)

    @classmethod
    def of(cls, layer: LoraLayer, name: str, value: Factors, dropout: float, trainable: bool) -> Self:
        A, B, alpha = value.A, value.B, value.alpha
        if value.parts is not None:
            compact = compact_packed(B, value.parts) if getattr(layer, "lora_parts", None) == value.parts else None
            if compact is not None:
                B = compact
            else:  # another adapter on the module is not packed: use the equivalent plain update of rank n·r
                plain = replace(value, parts=None)
                alpha = alpha * value.scale / plain.scale
        why = layer.lora_fits(A, B)
        if why:
            raise AdapterError(
                f"the adapter's factors do not fit '{name}' ({type(layer).__name__.removeprefix('Lora')}): {why}"
            )
        dtype = master_dtype(layer) if trainable else None
        A, B = (t.detach().to(device_of(layer), dtype, copy=True) for t in (A, B))
        return cls(layer.lora_laid_out(A), B, alpha, value.rslora, dropout, trainable)

    def value(self, layer: LoraLayer) -> Factors:
        A, B = layer.lora_full(self)
        kind, groups = layer.lora_kind, getattr(layer, "groups", 1)
        return Factors(
            A,
            B,
            self.alpha,
            kind,
            self.rslora,
            layer.lora_transposed and kind == "linear",
            groups if kind == "conv" else 1,
            getattr(layer, "lora_parts", None) if self.is_packed else None,
        )

    def pair(self, layer: LoraLayer) -> LoraFactors:
        return self

    @property
    def is_packed(self) -> bool:
        """Whether B is [n, out/parts, r]; a convolution's B has as many axes as its A."""
        return self.B.dim() == 3 and self.A.dim() == 2

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.rslora)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, A={list(self.A.shape)}, B={list(self.B.shape)}"


Live = LoraFactors
