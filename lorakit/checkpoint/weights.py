"""Read the base's weights of some modules, one at a time, from a checkpoint of any kind."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..adapter.update import Update, halves_swapped
from ..io.stream import Slot
from .base import Base
from .change import update_for
from .locate import locate, slot_at
from .parts import open_parts
from .single_file import WeightRows


@dataclass(frozen=True)
class Weight:
    """Where a base stores a module's weight. `rows`: the rows, and how their layout differs from the module's."""

    base: Base
    slot: Slot
    rows: WeightRows


@dataclass(frozen=True)
class Weights:
    """The stored weights of an adapter's modules, by module name."""

    stored: Mapping[str, Weight]

    def norm(self, module: str) -> float:
        """Return ‖W‖_F, block by block."""
        total = 0.0
        for _, block in self.stored[module].slot.rows():
            total += float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
        return total**0.5

    def transposed(self, module: str, update: Update) -> bool:
        """Whether the weight is stored as [in, out]. Raises AdapterError if the update does not fit it."""
        weight = self.stored[module]
        return update_for(module, update, weight.slot, weight.base.model_type, rows=weight.rows).transposed

    def read(self, module: str, update: Update) -> Tensor:
        """Read W, in float32 as [out, in·k], like the update's matrix. Raises AdapterError if the update does not fit
        it.
        """
        transposed, weight = self.transposed(module, update), self.stored[module]
        W = torch.cat([block.float() for _, block in weight.slot.rows()])
        W = halves_swapped(W) if weight.rows.swapped else W
        return W.T if transposed else W


def open_weights(path: Path, modules: Collection[str], quantized: bool = True) -> Weights:
    """Find the weights of these modules in a transformers folder, a diffusers pipeline or a single file.

    quantized: whether quantized weights may be read. Raises TargetError if the base lacks a module.
    """
    stored: dict[str, Weight] = {}
    for part in open_parts(path, modules, quantized=quantized):
        own = {module.removeprefix(part.called("")): module for module in modules if module.startswith(part.called(""))}
        locations = locate(part.base, own)
        stored |= {
            own[m]: Weight(part.base, slot_at(part.base, rows, locations.ties), rows)
            for m, rows in locations.modules.items()
        }
    return Weights(stored)
