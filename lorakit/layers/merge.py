"""Add a module's active ΔW to its weight, and remove it again bit for bit (see `ops.exact`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import StateError
from ..ops.exact import Undo, add_, subtract_
from .bases import base_of
from .layer import LoraLayer


def merge_module(layer: LoraLayer, name: str) -> None:
    """Add Σ weight · ΔW to the module's weight in place. `name`: the module's, for errors.

    Raises StateError for a weight or an update that cannot be merged (quantized, offloaded, ...), and for an update
    that is not finite.
    """
    weight = base_of(layer).writable(layer, name)
    for update, _ in layer.lora_in_use():
        value = update.value(layer)
        why = value.unmergeable()
        if why is not None:
            raise StateError(f"'{name}' {why}")
        for key, tensor in value.tensors().items():
            check_finite(tensor, f"{key} of '{name}'")
    with torch.no_grad():
        layer.lora_merged = add_(weight, _rows(layer, weight), f"'{name}'")


def check_finite(tensor: Tensor, where: str) -> None:
    """Raise StateError for a tensor with NaN or infinity in it, which merging would spread over the weight."""
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise StateError(
            f"{where} has {bad} NaN or infinite element{'s' if bad > 1 else ''}, so it cannot be merged\n"
            "  training diverged: take an earlier checkpoint, or a lower learning rate"
        )


def unmerge_module(layer: LoraLayer, name: str) -> None:
    """Restore the weight's original bits. Raises StateError, and changes nothing, if that is not possible."""
    undo: Undo = layer.lora_merged
    layer.lora_merged = None  # so that lora_in_use returns the merged updates
    try:
        with torch.no_grad():
            weight = base_of(layer).writable(layer, name)
            subtract_(weight, _rows(layer, weight), undo, f"'{name}'")
    except StateError:
        layer.lora_merged = undo
        raise


def _rows(layer: LoraLayer, weight: Tensor) -> Callable[[slice], Tensor]:
    """Return a function of a slice of rows: Σ share · ΔW of the updates in use, for these rows of the weight."""
    changes = [update.rows(layer, share) for update, share in layer.lora_in_use()]

    def total(rows: slice) -> Tensor:
        first, *others = (change(rows, weight[rows]) for change in changes)
        for change in others:
            first = first.add_(change)
        return first

    return total
