"""What one stored weight gains, of each kind of update, given block by block of its rows.

    low rank         ΔW = s · B A                                            nothing but the factors is in memory
    LoHa, LoKr, ΔW   the whole ΔW, made when its weight's turn comes
    DoRA             ΔW = m (W + s · B A) / ‖W + s · B A‖ - W                Liu et al. 2024: it depends on W

`on(slot)` gives a function (rows, W[rows]) -> ΔW[rows], both [rows, -1] as the weight is stored. A norm that runs across the blocks (DoRA on
a weight stored as [in, out], or with a magnitude for each input) takes one more reading of the weight, before the first block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapter.algebra.decompose import shape_of
from ..adapter.dense import Dense
from ..adapter.lora import Factors
from ..adapter.update import Update
from ..errors import AdapterError, LorakitError
from ..io.stream import MERGEABLE, Slot
from ..ops.delta import as_matrices, delta_rows
from .single_file import Place

Rows = Callable[[slice, Tensor], Tensor]

# transformers' models with Conv1D, a linear stored as [in, out], and what those layers are called.
CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
CONV1D_LAYERS = {"c_attn", "c_proj", "c_fc", "q_attn"}


@dataclass(frozen=True)
class LowRank:
    """A [r, -1] and B [out, r] as matrices of float32 (or float64)."""

    module: str
    A: Tensor
    B: Tensor
    scale: float
    transposed: bool
    rank: int

    def on(self, slot: Slot) -> Rows:
        return lambda rows, _: delta_rows(self.A, self.B, self.scale, rows, self.transposed)


@dataclass(frozen=True)
class Whole:
    """A LoHa, a LoKr or a whole ΔW, times `scale`; of the latter the bias's part, where `bias` says so."""

    module: str
    update: Update
    scale: float = 1.0
    transposed: bool = False  # ΔW is [out, in], the weight stored as [in, out]
    swapped: bool = False  # the stored rows have their two halves the other way round
    bias: bool = False

    @property
    def rank(self) -> int:
        return self.update.rank

    def on(self, slot: Slot) -> Rows:
        if self.bias:
            assert isinstance(self.update, Dense)
            assert self.update.bias is not None
            full = self.update.bias.detach().float() * self.scale
        else:
            full = self.update.delta(None if self.transposed else slot.shape).mul_(self.scale)
        full = full.T if self.transposed else full
        full = halves_swapped(full) if self.swapped else full
        full = full.reshape(slot.shape[0], -1)
        return lambda rows, _: full[rows]


@dataclass(frozen=True)
class Dora:
    """`magnitude`: [out, 1], a norm for each output, or [1, in]."""

    low: LowRank
    magnitude: Tensor

    @property
    def module(self) -> str:
        return self.low.module

    @property
    def rank(self) -> int:
        return self.low.rank

    @property
    def transposed(self) -> bool:
        return self.low.transposed

    def on(self, slot: Slot) -> Rows:
        low = self.low.on(slot)
        by_output = self.magnitude.shape[0] > 1 or self.magnitude.shape == (1, 1)
        wanted = self.magnitude.detach().double().flatten()
        if by_output != self.low.transposed:  # a norm of each stored row: it is whole in its block

            def change(rows: slice, block: Tensor) -> Tensor:
                V = block.double() + low(rows, block)
                return V * _ratio(wanted[rows, None], V.norm(dim=1, keepdim=True)) - block

            return change
        total = torch.zeros(wanted.numel(), dtype=torch.float64)
        for rows, block in slot.rows():
            total += (block.double() + low(rows, block)).square().sum(0)
        ratio = _ratio(wanted, total.sqrt())
        return lambda rows, block: (block.double() + low(rows, block)) * ratio - block


Change = LowRank | Whole | Dora


def update_for(module: str, update: Update, slot: Slot, model_type: str = "", weight: float = 1.0, place: Place | None = None) -> Change:
    """An update of a stored weight. AdapterError where their shapes do not meet.

    place: says where the weight is stored otherwise than the module has it (transposed; its halves swapped, shift and scale of some norms).
    """
    _check_stored(module, slot)
    swapped, across_here = (place.swapped, place.transposed) if place is not None else (False, False)
    if not isinstance(update, Factors):
        # A whole ΔW is laid out as the module's weight is, and so differs from the stored one only where the file turns it.
        turned = across_here or (not isinstance(update, Dense) and _is_conv1d(module, model_type))
        return _whole(module, update, slot, turned, weight, swapped)
    f = _swapped(update) if swapped else update
    f = replace(f, transposed=True) if across_here else f
    if f.A.shape[0] != f.B.shape[1]:
        raise AdapterError(
            f"'{module}' carries PEFT's grouped form, whose A reads across the convolution's groups: no change of its weight does the same\n"
            "  keep this adapter unmerged"
        )
    plain = (f.B.shape[0], *f.A.shape[1:])  # [out, in] or [out, in/g, *k]
    across = (f.A.shape[1], f.B.shape[0])  # Conv1D's [in, out], an embedding's [vocab, dim]
    fits = _matrix(slot.shape) == _matrix(plain)
    if f.kind == "linear" and slot.shape == plain == across:
        transposed = f.transposed or _is_conv1d(module, model_type)
    else:
        transposed = f.kind != "conv" and slot.shape == across and (f.kind == "embedding" or not fits)
        if not transposed and (f.kind == "embedding" or not fits):
            expected = across if f.kind == "embedding" or f.transposed else plain
            raise AdapterError(
                f"'{module}' has a weight of {list(slot.shape)} in the base; the adapter's factors (A {list(f.A.shape)}, B {list(f.B.shape)}) "
                f"are for {list(expected)}\n  is it an adapter for another model, or one of another size?"
            )
    low = LowRank(module, *as_matrices(f.A, f.B), f.scale * weight, transposed, f.rank)
    if f.magnitude is None:
        return low
    if weight != 1:
        raise AdapterError(
            f"'{module}' is a DoRA, which has one strength, that of its training; its weight is {weight:g}\n  merge it with weight 1"
        )
    return Dora(low, f.magnitude)


def is_zero(update: Update) -> bool:
    """Whether it changes nothing, whatever the weight. A DoRA's magnitude may, with factors of zero."""
    if isinstance(update, Factors):
        return update.magnitude is None and not (update.A.any() and update.B.any())
    parts = [bool(t.any()) for t in update.tensors().values()]
    return not (any(parts) if isinstance(update, Dense) else all(parts))  # of a product every part counts


def bias_for(module: str, update: Dense, slot: Slot, weight: float = 1.0, swapped: bool = False) -> Whole:
    """What a whole update adds to the bias. AdapterError where their shapes do not meet."""
    _check_stored(f"{module}.bias", slot)
    assert update.bias is not None
    if update.bias.numel() != slot.shape[0] or len(slot.shape) != 1:
        raise AdapterError(f"'{module}' has a bias of {list(slot.shape)} in the base; the adapter changes one of {list(update.bias.shape)}")
    return Whole(f"{module}.bias", update, weight, swapped=swapped, bias=True)


def halves_swapped(rows: Tensor) -> Tensor:
    """The second half of the rows before the first."""
    return torch.cat(rows.chunk(2)[::-1])


def _whole(module: str, update: Update, slot: Slot, across: bool, weight: float, swapped: bool) -> Whole:
    if isinstance(update, Dense):  # laid out as its weight is, in one dimension for a norm
        assert update.weight is not None
        shape = tuple(update.weight.shape)
        fits = _matrix(shape) == _matrix(slot.shape)
    else:  # [out, in], or [out, in·k] where the factors do not tell a kernel
        shape = shape_of(update)
        fits = (shape[0], math.prod(shape[1:])) == (slot.shape[0], math.prod(slot.shape[1:]))
    transposed = across and slot.shape == shape[::-1]
    if not transposed and not fits:
        raise AdapterError(
            f"'{module}' has a weight of {list(slot.shape)} in the base; the adapter's {type(update).__name__} update is for {list(shape)}\n"
            "  is it an adapter for another model, or one of another size?"
        )
    return Whole(module, update, weight, transposed, swapped)


def _check_stored(module: str, slot: Slot) -> None:
    if slot.dtype not in MERGEABLE:
        raise LorakitError(
            f"'{module}' is stored as {slot.dtype} (quantized?), which cannot take a low-rank update\n  merge into the unquantized base"
        )


def _is_conv1d(module: str, model_type: str) -> bool:
    return model_type in CONV1D_MODELS and module.rsplit(".", 1)[-1] in CONV1D_LAYERS


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A convolution of 1x1 is a matrix, and some files of one model have it so, others so."""
    return shape[:2] if len(shape) > 2 and set(shape[2:]) == {1} else shape


def _swapped(f: Factors) -> Factors:
    magnitude = f.magnitude
    if magnitude is not None and magnitude.shape[0] > 1:
        magnitude = halves_swapped(magnitude)
    return replace(f, B=halves_swapped(f.B), magnitude=magnitude)


def _ratio(wanted: Tensor, norm: Tensor) -> Tensor:
    """What brings a norm to the wanted one; a row of zeros stays one."""
    return torch.where(norm > 0, wanted / norm, 0)
