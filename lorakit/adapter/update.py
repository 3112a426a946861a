"""What every kind of update answers: how the weight of one module is changed, as a value.

    LoRA    ΔW = s · B A                                    lora.py
    DoRA    ΔW = m (W + D) / ‖W + D‖ - W                    dora.py; D = s · B A: the update that it is built on
    LoHa    ΔW = s · (W1a W1b) ∘ (W2a W2b)                  loha.py
    LoKr    ΔW = s · W1 ⊗ W2                                lokr.py
    dense   ΔW itself                                       dense.py

A kind is a frozen dataclass of tensors and numbers in a file of its own. The methods implemented in this file are the
same for all kinds, unless a kind overrides them.

A weight is stored as [out, in·k...], or transposed as [in, out] (transformers' Conv1D, embeddings). `rows` is the one
method that computes ΔW for some rows of the stored weight: live merge, checkpoint merge, analysis and export all use
it. What a file format needs of a kind is in `factors`, `tensors` and `output_tensors`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from .algebra.svd import Svd, matrix_svd, product_svd

if TYPE_CHECKING:
    from .lora import Factors, Form

Rows = Callable[[slice, Tensor], Tensor]  # (rows, W[rows]) -> ΔW[rows], both [rows, -1]; float32, or float64
Read = Callable[[], Iterable[tuple[slice, Tensor]]]  # the stored weight once more, block by block


@dataclass(frozen=True)
class LowRank:
    """ΔW = L R."""

    left: Tensor  # [out, r]
    right: Tensor  # [r, in·k]


@dataclass(frozen=True)
class Update(ABC):
    """One module's update. `variant`: what the kind is called, as in `LoraConfig.variant` where it can be trained."""

    @property
    @abstractmethod
    def variant(self) -> str: ...

    @property
    @abstractmethod
    def rank(self) -> int: ...

    @property
    @abstractmethod
    def scale(self) -> float: ...

    @property
    def parameters(self) -> int:
        """How many elements it holds."""
        return sum(t.numel() for t in self.tensors().values())

    @property
    def parts(self) -> tuple[bool, ...] | None:
        """The adapted parts of a packed projection."""
        return None

    @property
    def needs_base(self) -> bool:
        """Whether ΔW depends on W."""
        return False

    @property
    def is_matrix(self) -> bool:
        """Whether ΔW is of a matrix or a kernel: low-rank factors can stand for it. Else it is of a norm or a bias
        alone.
        """
        return True

    @property
    def changes_weight(self) -> bool:
        return True

    @property
    def changes_bias(self) -> bool:
        return False

    @property
    def sizes(self) -> tuple[int, int]:
        """(out, in) of the module, a convolution's in without its kernel; in is 1 for a norm or a bias."""
        out, inner = (*self.weight_shape(), 1)[:2]
        return out, inner

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the names of their fields."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        """The same update with `change(name, tensor)` in place of each tensor."""
        changed: dict[str, Any] = {name: change(name, t) for name, t in self.tensors().items()}
        return replace(self, **changed)

    @property
    def factors(self) -> Factors | None:
        """The low-rank factors A and B that it is built on: a LoRA itself, a DoRA's; None for other kinds."""
        return None

    def map_factors(self, change: Callable[[Factors], Factors]) -> Update:
        """The same update with `change(factors)` in place of its low-rank factors; itself if it has none."""
        return self

    @abstractmethod
    def check(self, module: str) -> None:
        """Raise AdapterError if this cannot be an update."""

    def unmergeable(self) -> str | None:
        """Why no change of a weight does the same, or None."""
        return None

    def is_zero(self) -> bool:
        """Whether it changes nothing, whatever the weight. Of a product every factor counts."""
        return not all(bool(t.any()) for t in self.tensors().values())

    @abstractmethod
    def times(self, weight: float, module: str) -> Self:
        """`weight` · ΔW, of the same kind. AdapterError, naming the module, where that is no such update or too large
        for its precision.
        """

    # ΔW by itself

    @abstractmethod
    def weight_shape(self) -> tuple[int, ...]:
        """The weight's shape, as far as the update's own tensors tell it (a kernel may be flat)."""

    @abstractmethod
    def delta(self, shape: tuple[int, ...] | None = None) -> Tensor:
        """ΔW in float32 (float64 stays), in the weight's layout.
        AdapterError where there is none without the weight.
        """

    def matrix(self, transposed: bool = False) -> Tensor:
        """ΔW as [out, in·k], in float32 (float64 stays). `transposed`: the weight is stored as [in, out]."""
        full = self.delta().reshape(self.weight_shape()).flatten(1)
        return full.T if transposed else full

    @property
    def bias_apart(self) -> bool:
        """Whether a change of the bias stands beside an update of the weight, which may be another (`with_weight`)."""
        return False

    def with_weight(self, after: Update) -> Update:
        """`after` as the update of the weight, beside this one's change of the bias, if it has one apart."""
        return after

    def without_base(self) -> Update:
        """The part that does not depend on W: all of it, or a DoRA's low-rank part."""
        return self

    def low_rank(self) -> LowRank | None:
        """The exact L and R in float64; None where the rank of such a product is no smaller than the matrix, or ΔW
        depends on W.
        """
        return None

    def singular_values(self, rank: int | None = None, keep: float | None = None) -> list[Svd]:
        """One SVD of ΔW, or one for each adapted part of a packed projection.

        `rank`, `keep`: how much of it is wanted, for those kinds where a part is cheaper than the whole (more may
        come).
        """
        found = self.low_rank()
        return [product_svd(found.left, found.right) if found is not None else matrix_svd(self.matrix(), rank, keep)]

    @abstractmethod
    def form(self, module: str) -> Form:
        """What low-rank factors of this module are like. AdapterError if no such factors can say the same."""

    # ΔW on a stored weight

    def layout(self, shape: tuple[int, ...], turned: bool = False, conv1d: bool = False) -> bool | None:
        """Whether a weight of this shape is stored transposed; None if the update is not for such a weight.

        turned: the file has this weight the other way round than the module. conv1d: it is a Conv1D's, whose weight is
        [in, out].
        """
        own = self.weight_shape()
        if (turned or conv1d) and shape == own[::-1]:
            return True
        return False if (own[0], math.prod(own[1:])) == (shape[0], math.prod(shape[1:])) else None

    @abstractmethod
    def rows(
        self, shape: tuple[int, ...], transposed: bool = False, weight: float = 1.0, read: Read | None = None
    ) -> Rows:
        """`weight` · ΔW by blocks of rows of a weight stored in this shape.

        read: where ΔW depends on W in a way that runs across the rows, the stored weight is read once more before the
        first block.
        """

    # Some outputs of a module: the parts of a fused projection, the shift and scale of an adaptive norm

    def output_tensors(self) -> dict[str, Tensor] | None:
        """The tensors whose first axis runs over the outputs, or over blocks of outputs (LoKr); all outputs share the
        other tensors. None if no tensor has the outputs first (a kernel in Tucker form).
        """
        return None

    @property
    def output_block(self) -> int:
        """How many outputs one row of `output_tensors` stands for, at most: outputs are cut at multiples of it."""
        return max((self.sizes[0] // t.shape[0] for t in (self.output_tensors() or {}).values()), default=1)

    @property
    def outputs_independent(self) -> bool:
        """Whether the ΔW of some outputs depends on no other outputs of W."""
        return True

    def as_factors(self) -> Factors | None:
        """Low-rank factors with exactly this ΔW, whose outputs can be cut anywhere; None if the kind has none."""
        return None

    def halves_swapped(self) -> Update:
        """The same update of a weight whose rows' second half comes first."""
        from .dense import Dense

        outputs = self.output_tensors()
        if outputs is None or (self.sizes[0] // 2) % self.output_block:
            return Dense(halves_swapped(self.delta()))
        return self.map(lambda name, t: halves_swapped(t) if name in outputs else t)


def halves_swapped(rows: Tensor) -> Tensor:
    """The second half of the rows before the first."""
    return torch.cat(rows.chunk(2)[::-1])


def as_matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A convolution of 1x1 is a matrix: some files of one model have it so, others so."""
    return shape[:2] if len(shape) > 2 and set(shape[2:]) == {1} else shape
