"""The base's weights of some modules, read one at a time from a checkpoint of any kind."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..adapter.update import Update, halves_swapped
from ..io.stream import Slot
from .base import Base
from .parts import open_parts
from .single_file import Place
from .update import update_for
from .where import find_places, slot_at


@dataclass(frozen=True)
class Weight:
    """Where a base holds a module's weight, and how: `place` says what is other than the module has it."""

    base: Base
    slot: Slot
    place: Place


@dataclass(frozen=True)
class Weights:
    """The weights of an adapter's modules, in the base's files."""

    found: Mapping[str, Weight]

    def norm(self, module: str) -> float:
        """‖W‖_F, block by block."""
        total = 0.0
        for _, block in self.found[module].slot.rows():
            total += float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
        return total**0.5

    def across(self, module: str, update: Update) -> bool:
        """Whether the weight is stored as [in, out]. AdapterError where the update does not fit it at all."""
        weight = self.found[module]
        return update_for(module, update, weight.slot, weight.base.model_type, place=weight.place).transposed

    def read(self, module: str, update: Update) -> Tensor:
        """W in float32 as [out, in], the same way round as the update's matrix."""
        across, weight = self.across(module, update), self.found[module]
        W = torch.cat([block.float() for _, block in weight.slot.rows()])
        W = halves_swapped(W) if weight.place.swapped else W
        return W.T if across else W


def open_weights(path: Path, modules: Collection[str]) -> Weights:
    """Of a transformers folder, a diffusers pipeline's, a diffusion model's single file. TargetError if it lacks one of
    the modules.
    """
    found: dict[str, Weight] = {}
    for part in open_parts(path, modules):
        own = {module.removeprefix(part.called("")): module for module in modules if module.startswith(part.called(""))}
        places = find_places(part.base, own)
        found |= {
            own[m]: Weight(part.base, slot_at(part.base, place, places.ties), place)
            for m, place in places.modules.items()
        }
    return Weights(found)
