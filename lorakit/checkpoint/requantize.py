"""Quantize merged weights again, and measure on the written files what is left of the adapter.

    Q' = Q(W + ΔW)          rounded to the nearest values of the format

    weight error            ‖Q' - (W + ΔW)‖ / ‖W + ΔW‖
    error over ΔW           ‖Q' - (W + ΔW)‖ / ‖ΔW‖
    share of ΔW kept        ⟨Q' - Q(W), ΔW⟩ / ‖ΔW‖²: the part of what changed that points along ΔW; 1: all of it

W of a quantized base lies on its format's values already, Q(W) = W. Then most of a ΔW that is smaller than half a step
is rounded away. If W is the unquantized base (`merge --onto`), its elements lie anywhere between two values, as many
are pushed over a border as ΔW says, and the share kept is near 1; the error stays that of the format.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LorakitError, TargetError, listing
from ..io.stream import Slot
from ..ops.delta import row_blocks
from .base import Base
from .merge_report import Requantized
from .quantized.format import Format, Shapes
from .quantized.found import UNQUANTIZED, StoredQuantization, format_for
from .quantized.weight import PackedSlot, QuantizedTensors
from .tied_weights import declared


@dataclass(frozen=True)
class Requantize:
    """How a base's quantized weights are quantized again. `settings`: None for those of each module in the base.
    `onto`: the unquantized base's weights by name, from which changed ones are computed instead.
    `config`: the `quantization_config` to write, None for the base's own. `ordinary`: the weights that become ordinary
    ones, since the new format does not take their shapes.
    """

    kind: str
    format: Format
    settings: Any | None
    config: Mapping[str, Any] | None = None
    onto: Mapping[str, Slot] | None = None
    ordinary: tuple[str, ...] = ()

    def is_same(self, packed: QuantizedTensors) -> bool:
        """Whether a weight keeps its format and settings."""
        return self.settings is None

    def packing(self, name: str, slot: PackedSlot) -> tuple[WeightCodec, Slot]:
        """Return how a weight is quantized, and the weight that ΔW is added to."""
        source: Slot | None = slot
        if self.onto is not None:
            source = self.onto.get(name)
            if source is None or source.shape != slot.shape:
                raise TargetError(f"the unquantized base has no weight '{name}' of shape {list(slot.shape)}")
        assert source is not None
        same = self.settings is None
        like = slot.packed if same else None
        settings = slot.packed.settings if same else self.settings
        return WeightCodec(name.removesuffix(".weight"), self.format, settings, slot.packed.shape, slot, like), source


def requantized_as(kind: str, base: Base, onto: Mapping[str, Slot] | None) -> Requantize | None:
    """Return how a base is quantized again as `kind`; "same": as it is. None if it is not quantized.

    onto: the unquantized base's weights. Raises LorakitError for an unknown kind.
    """
    own = base.quantization
    format = None if kind == "same" else format_for(kind)
    if own is None:
        return None
    if format is None or kind == own.kind:
        return Requantize(own.kind, own.format, None, onto=onto)
    settings = format.new_settings(kind, own.settings, base.dtype)
    packed = {name: slot.packed for name, slot in base.tensors.items() if isinstance(slot, PackedSlot)}
    ordinary = tuple(name for name, weight in packed.items() if not format.takes(weight.shape, settings))
    return Requantize(
        kind, format, settings, format.config(settings, _unquantized(base, own, ordinary)), onto, ordinary
    )


def ordinary_note(requantize: Requantize | None) -> list[str]:
    """Say which weights become ordinary ones, if some do."""
    if requantize is None or not requantize.ordinary:
        return []
    names = requantize.ordinary
    return [
        f"{len(names)} weights are written unquantized, as {requantize.kind} takes whole blocks of inputs: "
        f"{listing(names, 3)}"
    ]


def _unquantized(base: Base, own: StoredQuantization, ordinary: Collection[str]) -> list[str]:
    """Return the modules that are not quantized in OUT, as a config lists them: those in the base's files, the
    `ordinary` ones, those that the base's own config names, and those without a tensor because their weight is another
    one's (a tied head).

    transformers spares the head by itself only where a config has no list.
    """
    packed = {n for n, slot in base.tensors.items() if isinstance(slot, PackedSlot) and n not in ordinary}
    stored = [n for n, slot in base.tensors.items() if n not in packed and _is_matrix(n, slot)]
    tied = [user for user in declared(base) if user.endswith(".weight") and user not in base.tensors]
    listed = [name for key in UNQUANTIZED for name in own.config.get(key) or () if f"{name}.weight" not in packed]
    return list(dict.fromkeys([*(n.removesuffix(".weight") for n in (*stored, *tied)), *listed]))


def not_quantized(folder: object) -> LorakitError:
    """Return the error for a base that is to be quantized again and is not quantized."""
    return LorakitError(
        f"{folder} is not quantized, so there is nothing to quantize again\n"
        "  merge without requantize (--requantize), and quantize the result when it is loaded"
    )


def _is_matrix(name: str, slot: Slot) -> bool:
    return name.endswith(".weight") and len(slot.shape) == 2


@dataclass(frozen=True)
class WeightCodec:
    """How one weight is quantized. `shape`: (out, in). `base`: the weight in the base; `like`: its tensors, if the
    format and settings are the same.
    """

    module: str
    format: Format
    settings: Any
    shape: tuple[int, int]
    base: PackedSlot
    like: QuantizedTensors | None

    @property
    def own_shapes(self) -> Shapes:
        """Its tensors' dtypes and shapes, by their own names."""
        return self.format.written(self.shape, self.settings, self.like.shapes if self.like is not None else None)

    @property
    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Its tensors' dtypes and shapes, by their names in the file."""
        return {f"{self.module}.{own}": each for own, each in self.own_shapes.items()}

    def quantized(self, blocks: Iterable[Tensor]) -> dict[str, Tensor]:
        """Quantize a weight given in blocks of rows, as it is stored without quantization. Returns its tensors by their
        names in the file.

        Raises LorakitError, naming the module, if the format cannot hold it.
        """
        if self.base.transposed:
            blocks = [torch.cat(list(blocks)).T.contiguous()]
        aligned = _aligned(blocks, self.format.step(self.shape, self.settings))
        like = self.like.read() if self.like is not None else None
        try:
            own = self.format.quantized(aligned, self.shape, self.settings, like)
        except LorakitError as error:
            raise LorakitError(f"'{self.module}' cannot be quantized: {error}") from error
        return {f"{self.module}.{name}": tensor for name, tensor in own.items()}

    def slot(self, tensors: Mapping[str, Tensor] | Mapping[str, Slot]) -> PackedSlot:
        """Return the weight that quantized tensors stand for, in memory or in a file, by their names in the file."""
        own = {name: tensors[f"{self.module}.{name}"] for name in self.own_shapes}
        return self.base.with_tensors(self.format, self.settings, own)


class Measure:
    """Sums over blocks of rows for a `Requantized`."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.error = self.total = self.change = self.along = 0.0

    def add(self, target: Tensor, written: Tensor, before: Tensor, change: Tensor | None) -> None:
        """Add some rows. `target`: W + ΔW; `written`: Q'; `before`: Q(W)."""
        self.error += _squares(written - target)
        self.total += _squares(target)
        if change is not None:
            self.change += _squares(change)
            self.along += float(((written - before).double() * change).sum())

    def result(self) -> Requantized:
        """Return the measures of all rows added."""
        relative = (self.error / self.total) ** 0.5 if self.total else 0.0
        if not self.change:
            return Requantized(self.module, relative, None, None)
        return Requantized(self.module, relative, (self.error / self.change) ** 0.5, self.along / self.change)


def check_kept(reports: Iterable[Requantized], least: float, onto: bool) -> None:
    """Raise LorakitError if a weight keeps less of its ΔW than `least`. `onto`: whether W is the unquantized base's."""
    changed = sorted((r for r in reports if r.kept is not None), key=lambda r: r.kept or 0.0)
    lost = [r for r in changed if (r.kept or 0.0) < least]
    if not lost:
        return
    worst = "\n".join(f"    {r.module}: {_percent(r.kept)} kept, error {r.error_of_change:.3g} ‖ΔW‖" for r in lost[:3])
    more = f"\n    and {len(lost) - 3} more" if len(lost) > 3 else ""
    ways = [
        *([] if onto else ["quantize the unquantized base with the adapter instead: --onto ORIGINAL (onto=)"]),
        "write ordinary weights, without --requantize (requantize=), which keeps all of it",
        "keep the adapter unmerged",
        "or accept the loss: --keep-at-least 0 (keep_at_least=0)",
    ]
    raise LorakitError(
        f"rounding would undo the adapter: {len(lost)} of {len(changed)} weights keep less than {least:.0%} of their "
        f"ΔW, and nothing was written\n{worst}{more}\n  " + "\n  ".join(ways)
    )


def _percent(share: float | None) -> str:
    return f"{share or 0.0:.1%}"


def _squares(block: Tensor) -> float:
    return float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2


def _aligned(blocks: Iterable[Tensor], step: int) -> Iterator[Tensor]:
    """Yield the same rows in blocks whose borders are multiples of `step`, the last one excepted."""
    left: Tensor | None = None
    for block in blocks:
        rows = block if left is None else torch.cat([left, block])
        full = len(rows) // step * step
        if full:
            for part in row_blocks((full // step, step * rows.shape[1])):
                yield rows[part.start * step : part.stop * step]
        left = rows[full:] if full < len(rows) else None
    if left is not None:
        yield left
