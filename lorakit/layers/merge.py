"""Adding a module's active ΔW into its weight, and taking it out again to the last bit (see `ops.exact`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import StateError
from ..ops.exact import Undo, add_, subtract_
from .layer import LoraLayer


def merge_module(layer: LoraLayer, name: str) -> None:
    """W += Σ weight · ΔW, in place. StateError for a weight that cannot hold it (quantized, offloaded)."""
    weight: Tensor = layer.weight
    if "weight" not in layer._parameters:
        raise StateError(
            f"the weight of '{name}' is computed from others (a parametrization such as weight_norm), so nothing can "
            "be added to it\n"
            "  keep the adapter unmerged, or take the parametrization off: "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    if weight.is_meta:
        raise StateError(
            f"'{name}' is offloaded, so it cannot be merged here\n"
            "  merge the checkpoint's files instead: lorakit merge BASE ADAPTER OUT"
        )
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise StateError(
            f"'{name}' holds {weight.dtype} (quantized?), which cannot be merged in place\n"
            "  merge into the unquantized base"
        )
    for update, _ in layer.lora_in_use():
        why = update.value(layer).unmergeable()
        if why is not None:
            raise StateError(f"'{name}' {why}")
    with torch.no_grad():
        layer.lora_merged = add_(weight, _rows(layer))


def unmerge_module(layer: LoraLayer, name: str) -> None:
    """Restore the weight's original bits."""
    undo: Undo = layer.lora_merged
    layer.lora_merged = None  # so that lora_in_use tells what was merged
    try:
        with torch.no_grad():
            subtract_(layer.weight, _rows(layer), undo, f"'{name}'")
    except StateError:
        layer.lora_merged = undo
        raise


def _rows(layer: LoraLayer) -> Callable[[slice], Tensor]:
    """Σ weight · ΔW of what is in use, by blocks of the weight's rows."""
    weight: Tensor = layer.weight
    changes = [update.rows(layer, share) for update, share in layer.lora_in_use()]

    def total(rows: slice) -> Tensor:
        first, *others = (change(rows, weight[rows]) for change in changes)
        for change in others:
            first = first.add_(change)
        return first

    return total
