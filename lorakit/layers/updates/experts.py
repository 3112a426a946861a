"""LoRA on the experts of a live model: A [E, r, in] and B [E, out, r] as parameters, for one of their weights.

A layer's own choice for `variant="lora"` (`LoraLayer.lora_live`), so that a config has no name for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from ...adapter.experts import ExpertFactors
from ...config import LoraConfig, scale_of
from ...errors import AdapterError
from .update import LiveUpdate, device_of, master_dtype

if TYPE_CHECKING:
    from ..layer import LoraLayer


class LiveExperts(LiveUpdate):
    """One adapter's A and B of all experts, for one of their weights, with their scale and dropout.

    It is its own pair, with B [E, out, r] (not a packed one), of width 0: only `ExpertsLayer` asks for it.
    """

    gain = None

    def __init__(self, A: Tensor, B: Tensor, alpha: float, rslora: bool, dropout: float, trainable: bool):
        super().__init__()
        self.A = nn.Parameter(A, requires_grad=trainable)
        self.B = nn.Parameter(B, requires_grad=trainable)
        self.alpha, self.rslora, self.dropout = alpha, rslora, dropout
        self.rank = A.shape[1]

    @classmethod
    def fresh(cls, layer: LoraLayer, name: str, config: LoraConfig, trainable: bool) -> Self:
        rank = config.rank_of(name)
        A, B = layer.lora_fresh(layer.lora_shapes(rank), rank, config.init, master_dtype(layer), _device(layer))
        return cls(A, B, config.alpha_of(name), config.rslora, config.dropout, trainable)

    @classmethod
    def of(cls, layer: LoraLayer, name: str, value: ExpertFactors, config: LoraConfig, trainable: bool) -> Self:
        why = layer.lora_fits(value.A, value.B) if layer.lora_kind == "experts" else "this is no weight of experts"
        if why:
            raise AdapterError(f"the adapter's factors do not fit '{name}' ({type(layer).__name__}): {why}")
        dtype = master_dtype(layer) if trainable else None
        A, B = (t.detach().to(_device(layer), dtype, copy=True) for t in (value.A, value.B))
        return cls(A, B, value.alpha, value.rslora, config.dropout, trainable)

    def value(self, layer: LoraLayer) -> ExpertFactors:
        transposed = bool(layer.is_transposed)
        return ExpertFactors(self.A.detach(), self.B.detach(), self.alpha, self.rslora, transposed)

    def pair(self, layer: LoraLayer) -> LiveExperts:
        return self

    def faster(self, layer: LoraLayer) -> tuple[str, ...]:
        return ("B",)

    def freeze_a(self, layer: LoraLayer, name: str) -> None:
        self.A.requires_grad_(False)

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.rslora)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, A={list(self.A.shape)}, B={list(self.B.shape)}"


def _device(layer: LoraLayer) -> torch.device:
    """The device that the experts compute on: with accelerate's offload, the hook is theirs."""
    experts: Any = layer.experts
    return device_of(experts) if "_hf_hook" in experts.__dict__ else device_of(layer)


Live = LiveExperts
