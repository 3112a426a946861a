"""Read the base's weights of some modules, one at a time, from a checkpoint of any kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..adapter.update import Update, halves_swapped
from ..errors import AdapterError
from ..io.stream import Slot
from .base import Base
from .change import update_for
from .experts import as_stored
from .locate import locate, slot_at
from .parts import open_parts
from .single_file import WeightRows


@dataclass(frozen=True)
class Weight:
    """Where a base stores a module's weight. `module`: the files' name for it; `update`: the adapter's update of it, if
    there is one; `rows`: the rows, and how their layout differs from the module's.
    """

    base: Base
    slot: Slot
    rows: WeightRows
    module: str
    update: Update | None

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as [in, out]. Raises AdapterError if the update does not fit it."""
        assert self.update is not None
        return update_for(self.module, self.update, self.slot, self.base.model_type, rows=self.rows).transposed


@dataclass(frozen=True)
class Weights:
    """The stored weights of an adapter's modules, by module name: one each, or those of experts that have tensors of
    their own.
    """

    stored: Mapping[str, Sequence[Weight]]

    def norm(self, module: str) -> float:
        """Return ‖W‖_F, block by block. Raises AdapterError if the adapter's update does not fit W."""
        total = 0.0
        for weight in self.stored[module]:
            _ = weight.transposed
            for _, block in weight.slot.rows():
                total += float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
        return total**0.5

    def read(self, module: str) -> Tensor:
        """Read W, in float32 as [out, in·k], like the update's matrix. Raises AdapterError if the adapter's update does
        not fit W, or is one of experts.
        """
        weight, *others = self.stored[module]
        if others or weight.update is None or weight.update.matrices() is not None:
            raise AdapterError(f"'{module}' has a matrix for each expert; its weight is not read as one")
        transposed = weight.transposed
        W = torch.cat([block.float() for _, block in weight.slot.rows()])
        W = halves_swapped(W) if weight.rows.swapped else W
        return W.T if transposed else W


def open_weights(path: Path, updates: Mapping[str, Update | None], quantized: bool = True) -> Weights:
    """Find the weights of these modules in a transformers folder, a diffusers pipeline or a single file.

    updates: by module; None for a weight that is read as it is stored. quantized: whether quantized weights may be
    read. Raises TargetError if the base lacks a module.
    """
    stored: dict[str, list[Weight]] = {}
    for part in open_parts(path, updates, quantized=quantized):
        front = part.called("")
        own = {m.removeprefix(front): update for m, update in updates.items() if m.startswith(front)}
        by_module: dict[str, Mapping[str, Update | None]] = {m: {m: None} for m in own}
        by_module |= as_stored(part.base, {m: update for m, update in own.items() if update is not None})
        every = {name: update for each in by_module.values() for name, update in each.items()}
        locations = locate(part.base, every)
        for module, each in by_module.items():
            stored[front + module] = [
                Weight(part.base, slot_at(part.base, rows, locations.ties), rows, name, update)
                for name, update in each.items()
                for rows in (locations.modules[name],)
            ]
    return Weights(stored)
