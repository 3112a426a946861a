"""LoRA on a live module: A and B as parameters, which the layer uses (`pair`). Each layer's file gives their shapes.

An update that did not start at random may have a frozen pair A₀, B₀ besides (`layers.init`), which is subtracted:

    ΔW = s · (B A - B₀ A₀) = s · [B - B₀, B₀] [A; A - A₀]

The right side is what the layers and files get, a plain LoRA of rank 2r: zero to the bit at the start, and in 16 bits
the small differences keep their digits. The gradients of A and B are those of s · B A.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ...adapter.lora import Factors
from ...config import LoraConfig, scale_of
from ...errors import AdapterError, StateError, TargetError
from ...ops.packed import compact_packed
from ..versions import Versions
from .update import LiveUpdate, Pair, device_of, master_dtype

if TYPE_CHECKING:
    from ..layer import LoraLayer


class Subtracted(NamedTuple):
    """The pair [A; A - A₀] [2r, in], [B - B₀, B₀] [out, 2r], with the scale of rank r."""

    A: Tensor
    B: Tensor
    scale: float
    dropout: float
    gain: Tensor | None = None


class LoraFactors(LiveUpdate):
    """One adapter's A and B on one module, with their scale and dropout. `A0`, `B0`: the frozen pair, if it has one."""

    starts = True
    gain = None
    A0: Tensor | None
    B0: Tensor | None

    def __init__(self, A: Tensor, B: Tensor, alpha: float, rslora: bool, dropout: float, trainable: bool):
        super().__init__()
        self.A = nn.Parameter(A, requires_grad=trainable)
        self.B = nn.Parameter(B, requires_grad=trainable)
        self.alpha, self.rslora, self.dropout = alpha, rslora, dropout
        self.rank = B.shape[-1] if self.is_packed else A.shape[0]
        self.width = A.shape[0]
        self.A0 = self.B0 = None
        self._kept: tuple[Versions, Subtracted] | None = None

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
    def of(cls, layer: LoraLayer, name: str, value: Factors, config: LoraConfig, trainable: bool) -> Self:
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
        return cls(layer.lora_laid_out(A), B, alpha, value.rslora, config.dropout, trainable)

    def begin(self, layer: LoraLayer, values: tuple[Tensor, Tensor] | None, subtracted: bool) -> None:
        with torch.no_grad():
            for own, value in zip((self.A, self.B), values or (), strict=False):
                own.copy_(value)
        if subtracted:
            del self.A0, self.B0
            self.register_buffer("A0", self.A.detach().clone())
            self.register_buffer("B0", self.B.detach().clone())
            self.width = 2 * self.A.shape[0]

    def value(self, layer: LoraLayer) -> Factors:
        pair = self.pair(layer)
        A, B = layer.lora_full(pair)
        kind, groups = layer.lora_kind, getattr(layer, "groups", 1)
        return Factors(
            A,
            B,
            self.alpha if pair is self else self.alpha * (2**0.5 if self.rslora else 2),  # of rank 2r
            kind,
            self.rslora,
            layer.lora_transposed and kind == "linear",
            groups if kind == "conv" else 1,
            getattr(layer, "lora_parts", None) if self.is_packed else None,
        )

    def pair(self, layer: LoraLayer) -> Pair:
        if self.A0 is None or self.B0 is None:
            return self
        A, B, A0, B0 = self.A, self.B, self.A0, self.B0
        trains = (self.training or torch.is_grad_enabled()) and (A.requires_grad or B.requires_grad)
        if torch.compiler.is_compiling() or trains:
            return self._subtracted(A, B, A0, B0)
        tensors = (A, B, A0, B0)
        if self._kept is None or not self._kept[0].are(tensors):
            versions = Versions.of(tensors)
            with torch.inference_mode(False), torch.no_grad():  # it outlives the call, which may be in inference mode
                subtracted = self._subtracted(A, B, A0, B0)
            if versions is None:
                return subtracted
            self._kept = versions, subtracted
        return self._kept[1]

    def forget_computed(self) -> None:
        self._kept = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # a copy has other tensors

    def _subtracted(self, A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> Subtracted:
        delta, up = A - A0, torch.cat([B - B0, B0], 1 if B.dim() == A.dim() else -1)
        if not self.is_packed:
            return Subtracted(torch.cat([A, delta]), up, self.scale, self.dropout)
        parts = len(B)  # each part's own factors stay together: [A; A - A₀] of the first part, of the second, ...
        down = torch.cat([A.unflatten(0, (parts, -1)), delta.unflatten(0, (parts, -1))], 1)
        return Subtracted(down.flatten(0, 1), up, self.scale, self.dropout)

    def faster(self, layer: LoraLayer) -> tuple[str, ...]:
        """B. Not an embedding's: LoRA+'s ratio follows from A's many inputs, and each token has one."""
        return () if layer.lora_kind == "embedding" else ("B",)

    def freeze_a(self, layer: LoraLayer, name: str) -> None:
        if layer.lora_kind == "embedding":
            raise TargetError(
                f"'{name}' is an embedding, whose A starts at zero: with freeze_a it would learn nothing\n"
                "  remove it from the targets, or omit freeze_a"
            )
        self.A.requires_grad_(False)

    @property
    def is_packed(self) -> bool:
        """Whether B is [n, out/parts, r]; a convolution's B has as many axes as its A."""
        return self.B.dim() == 3 and self.A.dim() == 2

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.rslora)

    def extra_repr(self) -> str:
        start = "" if self.A0 is None else ", minus its start"
        return f"rank={self.rank}, alpha={self.alpha:g}, A={list(self.A.shape)}, B={list(self.B.shape)}{start}"


Live = LoraFactors
