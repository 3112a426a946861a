"""One update applied to one stored weight, in the layout of the file and with the adapter's weight.

`on(slot)` gives a function (rows, W[rows]) -> ΔW[rows], both [rows, -1] as the weight is stored. Each kind of update
computes ΔW itself (`adapter.update`); this file checks that it fits the stored weight, and in which layout.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..adapter.dense import with_halves_swapped
from ..adapter.update import Rows, Update
from ..errors import AdapterError, LorakitError
from ..io.stream import MERGEABLE, Slot
from .conv1d import is_conv1d
from .single_file import WeightRows


@dataclass(frozen=True)
class Change:
    """`weight` · ΔW of a module (or of its bias). `transposed`: the weight is stored as [in, out]. `swapped`: the
    second half of its rows is stored first.
    """

    module: str
    update: Update
    weight: float = 1.0
    transposed: bool = False
    swapped: bool = False

    @property
    def rank(self) -> int:
        """The rank of the update's factors."""
        return self.update.rank

    def on(self, slot: Slot) -> Rows:
        """Compute ΔW by blocks of rows of this stored weight."""
        update = with_halves_swapped(self.update) if self.swapped else self.update
        return update.rows(slot.shape, self.transposed, self.weight, slot.rows)


def update_for(
    module: str, update: Update, slot: Slot, model_type: str = "", weight: float = 1.0, rows: WeightRows | None = None
) -> Change:
    """Build the change of a module's stored weight. `rows`: how its layout in the file differs from the module's
    (transposed, or its halves swapped: shift and scale of some norms).

    Raises AdapterError if the shapes do not fit, and for updates that cannot be merged; LorakitError if the weight is
    quantized.
    """
    _check_stored(module, slot)
    swapped, file_transposed = (rows.swapped, rows.transposed) if rows is not None else (False, False)
    why = update.unmergeable()
    if why is not None:
        raise AdapterError(f"'{module}' {why}")
    transposed = update.layout(slot.shape, file_transposed, is_conv1d(module, model_type))
    if transposed is None:
        own = update.weight_shape()
        held = ", ".join(f"{name} {list(t.shape)}" for name, t in update.tensors().items())
        raise AdapterError(
            f"'{module}' has a weight of {list(slot.shape)} in the base; the adapter's update ({held}) is for "
            f"{list(own[::-1] if file_transposed else own)}\n"
            "  is it an adapter for another model, or one of another size?"
        )
    update = update.on_weight(slot.shape, transposed)
    return Change(module, update, weight, transposed, swapped)


def bias_for(module: str, update: Update, slot: Slot, weight: float = 1.0, swapped: bool = False) -> Change:
    """Build the change of a module's bias. Raises AdapterError if the shapes differ, LorakitError if the bias is
    quantized.
    """
    _check_stored(f"{module}.bias", slot)
    own = update.bias_update()
    assert own is not None
    if len(slot.shape) != 1 or own.sizes[0] != slot.shape[0]:
        raise AdapterError(
            f"'{module}' has a bias of {list(slot.shape)} in the base; the adapter changes one of [{own.sizes[0]}]"
        )
    return Change(f"{module}.bias", own, weight, swapped=swapped)


def _check_stored(module: str, slot: Slot) -> None:
    if slot.dtype not in MERGEABLE:
        raise LorakitError(
            f"'{module}' is stored as {slot.dtype} (quantized?), which cannot take a low-rank update\n"
            "  merge into the unquantized base"
        )
