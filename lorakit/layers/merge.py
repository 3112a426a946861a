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

    Raises StateError for a weight or an update that cannot be merged (quantized, offloaded, ...).
    """
    weight = base_of(layer).writable(layer, name)
    for update, _ in layer.lora_in_use():
        why = update.value(layer).unmergeable()
        if why is not None:
            raise StateError(f"'{name}' {why}")
    with torch.no_grad():
        layer.lora_merged = add_(weight, _rows(layer, weight))


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
