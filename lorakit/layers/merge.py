"""Adding a module's active ΔW into its weight, and taking it out again to the last bit (see `ops.exact`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import StateError
from ..ops.delta import delta_rows
from ..ops.exact import Undo, add_, subtract_
from .conv import ConvLayer
from .layer import LoraLayer


def merge_module(layer: LoraLayer, name: str) -> None:
    """W += Σ weight · ΔW, in place. StateError for a weight that cannot hold it (quantized, offloaded)."""
    weight: Tensor = layer.weight  # type: ignore[attr-defined]
    if "weight" not in layer._parameters:  # type: ignore[attr-defined]
        raise StateError(
            f"the weight of '{name}' is computed from others (a parametrization such as weight_norm), so nothing can be added to it\n"
            "  keep the adapter unmerged, or take the parametrization off: torch.nn.utils.parametrize.remove_parametrizations"
        )
    if weight.is_meta:
        raise StateError(
            f"'{name}' is offloaded, so it cannot be merged here\n  merge the checkpoint's files instead: lorakit merge BASE ADAPTER OUT"
        )
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise StateError(f"'{name}' holds {weight.dtype} (quantized?), which cannot be merged in place\n  merge into the unquantized base")
    _check_expressible(layer, name)
    active = layer.lora_in_use()
    with torch.no_grad():
        layer.lora_merged = add_(weight, lambda rows: _rows(layer, active, rows))


def unmerge_module(layer: LoraLayer, name: str) -> None:
    """Restore the weight's original bits."""
    undo: Undo = layer.lora_merged
    layer.lora_merged = None  # so that lora_in_use tells what was merged
    try:
        with torch.no_grad():
            active = layer.lora_in_use()
            subtract_(layer.weight, lambda rows: _rows(layer, active, rows), undo, f"'{name}'")  # type: ignore[attr-defined]
    except StateError:
        layer.lora_merged = undo
        raise


def _rows(layer: LoraLayer, active: list, rows: slice) -> Tensor:
    total = None
    for factors, scale in active:
        A, B = layer.lora_full(factors)
        # A packed projection's expanded B has n·r columns; its scale is that of one part, so it is the same here.
        change = delta_rows(A.to(layer.weight.device), B.to(layer.weight.device), scale, rows, layer.lora_transposed)  # type: ignore[attr-defined]
        total = change if total is None else total.add_(change)
    assert total is not None
    return total


def _check_expressible(layer: LoraLayer, name: str) -> None:
    if isinstance(layer, ConvLayer):
        for factors, _ in layer.lora_in_use():
            if factors.A.shape[0] != factors.B.shape[1]:
                raise StateError(
                    f"'{name}' carries PEFT's grouped form, whose A reads across the convolution's groups: no change of its weight does the same\n"
                    "  keep this adapter unmerged"
                )
