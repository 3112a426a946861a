"""VeRA's update of one module, as a value (Kopiczko et al. 2024): two trained vectors around two random matrices.

    ΔW = diag(b) B diag(d) A        b: [out]   d: [r]   B: [out, r]   A: [r, in]

A and B are random, never trained, and shared by all modules: each takes the first `in` columns of A and the first `out`
rows of B. There is no scale alpha / r. ΔW is that of a LoRA of rank r, which `as_factors` gives.

PEFT's files do not say how many inputs a module has, and with `save_projection: false` they lack A and B, which follow
from a seed and the largest sizes. Such an update has `size_in` None: its ΔW depends on the base's shape, which a model
or a checkpoint tells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import AdapterError
from .checks import check_tensors, multiplied
from .dense import Dense
from .lora import Factors, FactorShapes
from .update import LowRank, Read, Rows, Update


@dataclass(frozen=True, eq=False)
class Projection:
    """The random matrices of one adapter: A [r, largest in], B [largest out, r], float32 if drawn here.

    Without matrices, it is what is known before the largest sizes are. They stay where they were made; copies on other
    devices are made once each, so that modules share them.
    """

    seed: int
    A: Tensor | None = None
    B: Tensor | None = None
    _moved: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def drawn(cls, seed: int, rank: int, out: int, size_in: int) -> Projection:
        """Draw the matrices for the largest sizes: kaiming-uniform, in PEFT's order, so that a seed gives the same."""
        made = torch.Generator(device="cpu").manual_seed(seed)
        A, B = torch.empty(rank, size_in, device="cpu"), torch.empty(out, rank, device="cpu")
        for matrix in (A, B):
            bound = math.sqrt(6 / matrix.shape[1])
            matrix.uniform_(-bound, bound, generator=made)
        return cls(seed, A, B)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return A and B on this device. Raises AdapterError if they are not known."""
        if self.A is None or self.B is None:
            raise AdapterError(
                "the file of this VeRA has no random matrices (PEFT's save_projection: false), which follow from the "
                "sizes of its base\n"
                "  lorakit.attach(model, adapter), then lorakit.capture(model).save(...) writes them"
            )
        if device not in self._moved:
            self._moved[device] = self.A.to(device), self.B.to(device)
        return self._moved[device]


@dataclass(frozen=True)
class Vera(Update):
    """`size_in`: the module's inputs; None if a file does not tell them. `transposed`: its weight is [in, out]."""

    d: Tensor
    b: Tensor
    projection: Projection
    size_in: int | None = None
    transposed: bool = False

    @property
    def variant(self) -> str:
        return "vera"

    @property
    def rank(self) -> int:
        return self.d.shape[0]

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def needs_base(self) -> bool:
        return self.size_in is None or self.projection.A is None

    @property
    def sizes(self) -> tuple[int, int]:
        return self.b.shape[0], self._inputs()

    def check(self, module: str) -> None:
        check_tensors(module, self.tensors(), axes=1)
        A, B = self.projection.A, self.projection.B
        if self.d.dim() != 1 or self.b.dim() != 1:
            raise AdapterError(
                f"adapter factors of '{module}': d {list(self.d.shape)} and b {list(self.b.shape)} should be vectors"
            )
        if A is None or B is None:
            return
        check_tensors(module, {"vera_A": A, "vera_B": B})
        rank, out = A.shape[0], B.shape[0]
        if (rank, B.shape[1]) != (self.rank, self.rank) or out < self.b.shape[0] or A.shape[1] < (self.size_in or 0):
            raise AdapterError(
                f"adapter factors of '{module}': d {list(self.d.shape)} and b {list(self.b.shape)} do not fit the "
                f"shared A {list(A.shape)} and B {list(B.shape)}"
            )

    def times(self, weight: float, module: str) -> Vera:
        if self.needs_base:
            raise AdapterError(f"'{module}' is a VeRA {self._unsized()}")
        return replace(self, b=multiplied(self.b, weight, module))

    # ΔW by itself

    def weight_shape(self) -> tuple[int, ...]:
        out, size_in = self.sizes
        return (size_in, out) if self.transposed else (out, size_in)

    def delta(self, shape: tuple[int, ...] | None = None) -> Tensor:
        return self.as_factors().delta(shape)

    def matrix(self, transposed: bool = False) -> Tensor:
        return self.as_factors().matrix()

    def without_base(self) -> Update:
        """Of an update whose size is not known: b dᵀ, by which it differs from other modules' updates."""
        return Dense(torch.outer(self.b, self.d)) if self.needs_base else self

    def low_rank(self) -> LowRank | None:
        return None if self.needs_base else self.as_factors().low_rank()

    def factor_shapes(self, module: str) -> FactorShapes:
        return FactorShapes("linear", (self.sizes[1],), transposed=self.transposed)

    def as_factors(self) -> Factors:
        return self.factors_for(self._inputs())

    def as_lora(self) -> Factors | None:
        if self.needs_base:
            return None
        f = self.as_factors()
        return replace(f, A=f.A.clone())  # files cannot hold modules that share memory

    def factors_for(self, size_in: int) -> Factors:
        """Return the LoRA with the same ΔW for a module of so many inputs. d goes into B, so that A stays shared."""
        A, B = self.projection.on(self.d.device)
        scaled = self.b[:, None] * B[: self.b.shape[0]] * self.d
        return Factors(A[:, :size_in], scaled, float(self.rank), transposed=self.transposed)

    # ΔW on a stored weight

    def layout(self, shape: tuple[int, ...], file_transposed: bool = False, conv1d: bool = False) -> bool | None:
        if len(shape) != 2:
            return None
        out = self.b.shape[0]
        if (self.transposed or file_transposed or conv1d) and self._is_for(shape[1], shape[0]):
            return True
        return False if self._is_for(shape[0], shape[1]) and not (self.transposed and shape != (out, out)) else None

    def _is_for(self, out: int, size_in: int) -> bool:
        A = self.projection.A
        fits = A is None or size_in <= A.shape[1]
        return out == self.b.shape[0] and (fits if self.size_in is None else size_in == self.size_in)

    def on_weight(self, shape: tuple[int, ...], transposed: bool) -> Vera:
        return replace(self, size_in=shape[0] if transposed else shape[1])

    def rows(
        self, shape: tuple[int, ...], transposed: bool = False, weight: float = 1.0, read: Read | None = None
    ) -> Rows:
        return self.factors_for(shape[0] if transposed else shape[1]).rows(shape, transposed, weight, read)

    # Some outputs of a module

    def halves_swapped(self) -> Update | None:
        """Return it as a LoRA: the rows of the shared B cannot be swapped."""
        return None if self.needs_base else self.as_factors().halves_swapped()

    def _inputs(self) -> int:
        if self.size_in is None:
            raise AdapterError(f"this is a VeRA {self._unsized()}")
        return self.size_in

    def _unsized(self) -> str:
        return (
            "whose file (PEFT's) does not say how many inputs its modules have\n"
            "  lorakit.attach(model, adapter), then lorakit.capture(model).save(...) writes them"
        )
