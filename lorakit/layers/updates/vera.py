"""VeRA on a live module (Kopiczko et al. 2024): random matrices that all modules share, and two trained vectors each.

    y = base(x) + diag(b) B diag(d) A x        b: [out]   d: [r]   B: [out, r]   A: [r, in]

d starts at `vera_start`, b at zero. One pair of matrices, for the largest sizes, is kept per adapter and device
(`adapter.vera`), and drawn from `vera_seed` as PEFT draws it. There is no scale.

The pair that the layers apply is A and B' = diag(b) B diag(d), computed in each forward. A needs no gradient, and what
is kept for backward is x Aᵀ and B', but no output of B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor, nn

from ...adapter.vera import Projection, Vera
from ...config import LoraConfig
from ...errors import AdapterError, TargetError
from ...ops.scaled import scaled
from .update import LiveUpdate, device_of, master_dtype

if TYPE_CHECKING:
    from ..layer import LoraLayer


class ScaledPair(NamedTuple):
    """A and B' = diag(b) B diag(d), which has their gradients."""

    A: Tensor
    B: Tensor
    dropout: float
    scale: float = 1.0
    gain: Tensor | None = None


class VeraVectors(LiveUpdate):
    """One adapter's vectors of one linear."""

    lacks = ("rslora", "alpha", "alpha_pattern")
    lacking = "has no scale"

    def __init__(self, d: Tensor, b: Tensor, projection: Projection, size_in: int, dropout: float, trainable: bool):
        super().__init__()
        self.d = nn.Parameter(d, requires_grad=trainable)
        self.b = nn.Parameter(b, requires_grad=trainable)
        self.projection, self.size_in, self.dropout = projection, size_in, dropout
        self.rank = self.width = d.shape[0]

    @classmethod
    def fresh(cls, layer: LoraLayer, name: str, config: LoraConfig, trainable: bool) -> Self:
        _check_layer(layer, name)
        if config.parts_of(name) is not None:
            raise TargetError(
                f"'{name}' is a packed projection, and VeRA cannot adapt parts of one\n  remove it from `packed`"
            )
        if config.rank_of(name) != config.rank:
            raise TargetError(
                f"'{name}' has rank {config.rank_of(name)} (LoraConfig.rank_pattern), and VeRA's modules share random "
                f"matrices of one rank, {config.rank}\n  remove rank_pattern"
            )
        size_in, size_out = layer.lora_sizes()
        dtype, device = master_dtype(layer), device_of(layer)
        d = torch.full((config.rank,), config.vera_start, dtype=dtype, device=device)
        b = torch.zeros(size_out, dtype=dtype, device=device)
        return cls(d, b, Projection(config.vera_seed), size_in, config.dropout, trainable)

    @classmethod
    def of(cls, layer: LoraLayer, name: str, value: Vera, config: LoraConfig, trainable: bool) -> Self:
        _check_layer(layer, name)
        size_in, size_out = layer.lora_sizes()
        A = value.projection.A
        if (
            value.b.shape[0] != size_out
            or value.size_in not in (None, size_in)
            or (A is not None and A.shape[1] < size_in)
        ):
            raise AdapterError(
                f"the adapter's VeRA vectors do not fit '{name}' ({type(layer).__name__.removeprefix('Lora')}): they "
                f"are for {value.b.shape[0]} outputs and {_inputs(value)} inputs; it has {size_out} and {size_in}"
            )
        dtype, device = master_dtype(layer) if trainable else None, device_of(layer)
        d, b = (t.detach().to(device, dtype, copy=True) for t in (value.d, value.b))
        return cls(d, b, value.projection, size_in, config.dropout, trainable)

    @classmethod
    def join(cls, updates: Sequence[Self]) -> None:
        """Draw the matrices that are not known yet: once for all modules of a seed, for the largest of them."""
        undrawn: dict[tuple[int, int], list[Self]] = {}
        for update in updates:
            if update.projection.A is None:
                undrawn.setdefault((update.projection.seed, update.rank), []).append(update)
        for (seed, rank), alike in undrawn.items():
            out, size_in = max(u.b.shape[0] for u in alike), max(u.size_in for u in alike)
            shared = Projection.drawn(seed, rank, out, size_in)
            for update in alike:
                update.projection = shared

    def value(self, layer: LoraLayer) -> Vera:
        return Vera(self.d.detach(), self.b.detach(), self.projection, self.size_in, layer.lora_transposed)

    def pair(self, layer: LoraLayer) -> ScaledPair:
        A, B = self.projection.on(self.b.device)
        return ScaledPair(A[:, : self.size_in], scaled(B[: self.b.shape[0]], self.b, self.d), self.dropout)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, d={list(self.d.shape)}, b={list(self.b.shape)}, seed={self.projection.seed}"


Live = VeraVectors


def _inputs(value: Vera) -> str:
    if value.size_in is not None:
        return str(value.size_in)
    return "unknown" if value.projection.A is None else f"at most {value.projection.A.shape[1]}"


def _check_layer(layer: LoraLayer, name: str) -> None:
    if layer.lora_kind != "linear":
        what = "an embedding" if layer.lora_kind == "embedding" else "a convolution"
        raise TargetError(
            f"'{name}' is {what}, for which VeRA is not defined (nor is it in PEFT)\n"
            "  remove it from the targets, or use variant='lora'"
        )
