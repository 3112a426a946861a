"""`Update`: how the weight of one module is changed, as a value. The interface of all kinds.

    LoRA    ΔW = s · B A                                    lora.py
    DoRA    ΔW = m (W + D) / ‖W + D‖ - W                    dora.py; D = s · B A: the update that it is built on
    LoHa    ΔW = s · (W1a W1b) ∘ (W2a W2b)                  loha.py
    LoKr    ΔW = s · W1 ⊗ W2                                lokr.py
    VeRA    ΔW = diag(b) B diag(d) A                        vera.py; A and B are random and shared
    (IA)³   ΔW = (l - 1) ∘ W, by rows or by columns         ia3.py; by rows it scales the bias too
    dense   ΔW itself                                       dense.py
    experts ΔW[e] = s · B[e] A[e] of each expert            experts.py

A kind is a frozen dataclass in a file of its own. The methods implemented in this file are the same for all kinds,
unless a kind overrides them.

A weight is stored as [out, in·k...], or transposed as [in, out] (transformers' Conv1D, embeddings). `rows` is the one
method that computes ΔW for some rows of the stored weight: live merge, checkpoint merge, analysis and export all use
it. What a file format needs of a kind is in `factors`, `tensors` and `output_tensors`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from .algebra.svd import Svd, matrix_svd, product_svd

if TYPE_CHECKING:
    from .lora import Factors, FactorShapes

Rows = Callable[[slice, Tensor], Tensor]  # (rows, W[rows]) -> ΔW[rows], both [rows, -1], in float32 or float64
Read = Callable[[], Iterable[tuple[slice, Tensor]]]  # reads the stored weight again: (rows, W[rows]) block by block


@dataclass(frozen=True)
class LowRank:
    """ΔW = L R."""

    left: Tensor  # [out, r]
    right: Tensor  # [r, in·k]


@dataclass(frozen=True)
class Update(ABC):
    """One module's update. `variant` names the kind, as `LoraConfig.variant` does for those that can be trained."""

    @property
    @abstractmethod
    def variant(self) -> str:
        """The kind's name: "lora", "dora", "loha", "lokr", "dense", ..."""

    @property
    def live_variants(self) -> tuple[str, ...]:
        """The kinds that must exist on a live model to attach it: its own, and that of the update it is built on."""
        return (self.variant,)

    @property
    @abstractmethod
    def rank(self) -> int:
        """The rank of its factors, r. That of ΔW may be higher (LoHa, LoKr)."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """The factor s in ΔW, alpha / r; 1 for kinds without one."""

    @property
    def parameters(self) -> int:
        """The number of elements of its tensors."""
        return sum(t.numel() for t in self.tensors().values())

    @property
    def parts(self) -> tuple[bool, ...] | None:
        """Which parts of a packed projection are adapted; None for other modules."""
        return None

    @property
    def needs_base(self) -> bool:
        """Whether ΔW depends on W."""
        return False

    @property
    def is_matrix(self) -> bool:
        """Whether ΔW is a matrix or a kernel, which has low-rank factors; False for a norm or a bias alone."""
        return True

    @property
    def changes_weight(self) -> bool:
        """Whether there is a ΔW; a dense update may change the bias alone."""
        return True

    @property
    def changes_bias(self) -> bool:
        """Whether it changes the module's bias too, by `tensors()["bias"]` [out]."""
        return False

    def bias_update(self) -> Update | None:
        """Return the update of the module's bias, as of a weight [out]; None if it does not change it."""
        from .dense import Dense

        return Dense(self.tensors()["bias"]) if self.changes_bias else None

    @property
    def needs_bias(self) -> bool:
        """Whether the module must have a bias, if this changes it."""
        return True

    @property
    def sizes(self) -> tuple[int, int]:
        """(out, in) of the module, a convolution's in without its kernel; in is 1 for a norm or a bias."""
        out, inner = (*self.weight_shape(), 1)[:2]
        return out, inner

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors by field name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        """Return a copy with `change(name, tensor)` in place of each tensor."""
        changed: dict[str, Any] = {name: change(name, t) for name, t in self.tensors().items()}
        return replace(self, **changed)

    @property
    def factors(self) -> Factors | None:
        """The low-rank factors A and B: a LoRA itself, or those that a DoRA is built on; None for other kinds."""
        return None

    @property
    def has_factors(self) -> bool:
        """Whether it is made of low-rank factors, of which `rank` is the rank."""
        return self.factors is not None

    def map_factors(self, change: Callable[[Factors], Factors]) -> Update:
        """Return a copy with `change(factors)` in place of the low-rank factors; the update itself if it has none."""
        return self

    @abstractmethod
    def check(self, module: str) -> None:
        """Raise AdapterError, naming the module, if the tensors or alpha are malformed."""

    def unmergeable(self) -> str | None:
        """Say why no change of a weight has the same effect; None if one has."""
        return None

    def is_zero(self) -> bool:
        """Whether ΔW is zero for every weight: one factor of a product is all zeros."""
        return not all(bool(t.any()) for t in self.tensors().values())

    @abstractmethod
    def times(self, weight: float, module: str) -> Self:
        """Return `weight` · ΔW, of the same kind. Raises AdapterError, naming the module, if the kind has no such
        multiple or its dtype cannot hold the values.
        """

    # ΔW by itself

    def weight_name(self, module: str) -> str:
        """Return the full name of the parameter that it changes: the module's `weight`, unless the name that adapters
        know the module by is the parameter's own.
        """
        return f"{module}.weight"

    @abstractmethod
    def weight_shape(self) -> tuple[int, ...]:
        """Return the weight's shape as far as the update's own tensors show it (a kernel may be flattened)."""

    @abstractmethod
    def delta(self, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return ΔW in float32 (float64 stays), in the weight's layout. `shape`: the weight's, if it is known.
        Raises AdapterError if ΔW depends on the weight.
        """

    def matrix(self, transposed: bool = False) -> Tensor:
        """Return ΔW as [out, in·k], in float32 (float64 stays). `transposed`: the weight is stored as [in, out]."""
        full = self.delta().reshape(self.weight_shape()).flatten(1)
        return full.T if transposed else full

    @property
    def bias_apart(self) -> bool:
        """Whether a change of the bias stands beside an update of the weight, which may be another (`with_weight`)."""
        return False

    @property
    def weight_alone(self) -> Update:
        """The update of the weight, without a change of the bias that stands apart."""
        return self

    def with_weight(self, after: Update) -> Update:
        """`after` as the update of the weight, beside this one's change of the bias, if it has one apart."""
        return after

    def without_base(self) -> Update:
        """Return the part that does not depend on W: the update itself, or the one that a DoRA is built on."""
        return self

    def low_rank(self) -> LowRank | None:
        """Return ΔW = L R exactly, in float64; None if such a product has full rank, or ΔW depends on W."""
        return None

    def singular_values(self, rank: int | None = None, keep: float | None = None) -> list[Svd]:
        """Return the SVD of ΔW, or one for each adapted part of a packed projection.

        rank: the number of singular values that the caller needs; keep: the share of their energy. Kinds for which a
        partial SVD is cheaper stop there; others return more.
        """
        low = self.low_rank()
        return [product_svd(low.left, low.right) if low is not None else matrix_svd(self.matrix(), rank, keep)]

    def matrices(self) -> tuple[Update, ...] | None:
        """Return the updates of the matrices that the weight is a stack of (experts); None if it is no stack."""
        return None

    def of_matrices(self, updates: Sequence[Update]) -> Update:
        """Return the update of the stack of which these are the matrices' updates, as `matrices` returns them.

        Raises AdapterError if they do not make one.
        """
        raise NotImplementedError

    @abstractmethod
    def factor_shapes(self, module: str) -> FactorShapes:
        """Return the shapes that low-rank factors of this module have. Raises AdapterError if no factors have the same
        effect.
        """

    # ΔW on a stored weight

    def layout(self, shape: tuple[int, ...], file_transposed: bool = False, conv1d: bool = False) -> bool | None:
        """Whether a weight of this shape is stored transposed, [in, out]; None if the update does not fit it.

        file_transposed: the file stores the transpose of the module's weight.
        conv1d: the module is a Conv1D, whose weight is [in, out].
        """
        own = self.weight_shape()
        if (file_transposed or conv1d) and shape == own[::-1]:
            return True
        return False if (own[0], math.prod(own[1:])) == (shape[0], math.prod(shape[1:])) else None

    def on_weight(self, shape: tuple[int, ...], transposed: bool) -> Update:
        """Return the update for a weight of this shape that it fits, where a file does not tell all sizes (VeRA)."""
        return self

    @abstractmethod
    def rows(
        self, shape: tuple[int, ...], transposed: bool = False, weight: float = 1.0, read: Read | None = None
    ) -> Rows:
        """Compute `weight` · ΔW block by block, of a weight stored in this shape (`transposed`: as [in, out]).

        read: reads the stored weight again; called before the first block if ΔW of a row depends on other rows.
        """

    # Some outputs of a module: the parts of a fused projection, the shift and scale of an adaptive norm

    def output_tensors(self) -> dict[str, Tensor] | None:
        """Return the tensors whose first axis runs over the outputs, or over blocks of outputs (LoKr); all outputs
        share the other tensors. None if no tensor has the outputs first (a kernel in Tucker form).
        """
        return None

    @property
    def output_block(self) -> int:
        """The number of outputs that one row of `output_tensors` covers, at most: outputs are cut at its multiples."""
        return max((self.sizes[0] // t.shape[0] for t in (self.output_tensors() or {}).values()), default=1)

    @property
    def outputs_independent(self) -> bool:
        """Whether ΔW of an output depends on no other outputs of W."""
        return True

    def as_factors(self) -> Factors | None:
        """Return low-rank factors with exactly this ΔW, which can be cut at any output; None if the kind has none."""
        return None

    def as_lora(self) -> Factors | None:
        """Return the LoRA of the same rank with exactly this ΔW, for kinds that are one in other tensors (VeRA), and
        for a LoRA itself; None for other kinds.
        """
        return None

    def halves_swapped(self) -> Update | None:
        """Return the same update for a weight stored with the second half of its rows first; None if the kind's
        tensors cannot express it (`dense.with_halves_swapped` always can).
        """
        outputs = self.output_tensors()
        if outputs is None or (self.sizes[0] // 2) % self.output_block:
            return None
        return self.map(lambda name, t: halves_swapped(t) if name in outputs else t)


def halves_swapped(rows: Tensor) -> Tensor:
    """Return the rows with their second half first."""
    return torch.cat(rows.chunk(2)[::-1])


def as_matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a 1x1 convolution as a matrix: files of one model store either."""
    return shape[:2] if len(shape) > 2 and set(shape[2:]) == {1} else shape
