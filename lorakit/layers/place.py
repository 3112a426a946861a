"""Factors for an adapted module: fresh ones from a config, or an adapter's, checked against the module's shape."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ..adapter.lora import Factors
from ..config import LoraConfig
from ..errors import AdapterError, StateError
from ..ops.packed import compact_packed
from .layer import LoraFactors, LoraLayer
from .linear import LinearLayer
from .packed import PackedLayer


def fresh_for(module: nn.Module, name: str, config: LoraConfig, trainable: bool) -> LoraFactors:
    """Fresh factors with ΔW = 0, float32 (float64 over a float64 base), on the module's device."""
    assert isinstance(module, LoraLayer)
    parts = config.parts_of(name)
    if parts is not None and getattr(module, "lora_parts", None) != parts:
        raise StateError(f"'{name}' carries another adapter already and cannot now become a packed projection of {len(parts)} parts")
    rank = config.rank_of(name)
    # Another adapter may have packed this module; that is nothing to one that is not packed.
    plain = parts is None and isinstance(module, PackedLayer)
    shapes = LinearLayer.lora_shapes(module, rank) if plain else module.lora_shapes(rank)  # type: ignore[arg-type]
    A, B = module.lora_fresh(shapes, rank, config.init, _master(module), _device(module))
    return LoraFactors(A, B, config.alpha_of(name), config.rslora, config.dropout, trainable)


def factors_for(module: nn.Module, name: str, factors: Factors, dropout: float, trainable: bool) -> LoraFactors:
    """An adapter's factors, copied to the module's device. AdapterError if they do not fit it."""
    assert isinstance(module, LoraLayer)
    A, B, alpha = factors.A, factors.B, factors.alpha
    if factors.parts is not None:
        compact = compact_packed(B, factors.parts) if getattr(module, "lora_parts", None) == factors.parts else None
        if compact is not None:
            B = compact
        else:  # beside an adapter that is not packed: as the plain update of rank n·r that it is
            plain = replace(factors, parts=None)
            alpha = alpha * factors.scale / plain.scale
    why = _misfit(module, A, B)
    if why:
        raise AdapterError(f"the adapter's factors do not fit '{name}' ({type(module).__name__.removeprefix('Lora')}): {why}")
    dtype = _master(module) if trainable else None
    device = _device(module)
    return LoraFactors(
        A.detach().to(device, dtype, copy=True), B.detach().to(device, dtype, copy=True), alpha, factors.rslora, dropout, trainable
    )  # fmt: skip


def _misfit(module: LoraLayer, A: torch.Tensor, B: torch.Tensor) -> str | None:
    if not isinstance(module, PackedLayer):
        return module.lora_fits(A, B)
    size_in, size_out = module.lora_sizes()
    if B.dim() == 3:
        fits = A.shape[1] == size_in and B.shape[1] * len(module.lora_parts) == size_out
    else:
        fits = A.shape[1] == size_in and tuple(B.shape) == (size_out, A.shape[0])
    return None if fits else f"A {list(A.shape)} and B {list(B.shape)} do not fit a packed [{size_in} -> {size_out}]"


def _master(module: LoraLayer) -> torch.dtype:
    weight = module.weight  # type: ignore[attr-defined]
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _device(module: LoraLayer) -> torch.device:
    hook = module.__dict__.get("_hf_hook")  # accelerate's offload leaves the weight on "meta" between calls
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else module.weight.device  # type: ignore[attr-defined]
