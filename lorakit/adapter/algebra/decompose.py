"""An update of any kind as singular values, and singular values as low-rank factors again.

LoRA        QR of its halves and an SVD of r x r                         a packed projection: each adapted part by itself
LoHa        the same, of the product of rank r² that it is (`product`)
LoKr        the SVD of W1 ⊗ W2 is the Kronecker product of their SVDs
whole ΔW    the full SVD if it is small, else at random

Only the last is not exact. The matrix is always [out, in·k...], whichever way round the weight is stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import AdapterError
from ...ops.delta import as_matrices
from ...ops.packed import expand_packed
from ..checks import narrowed
from ..dense import Dense
from ..loha import Hadamard
from ..lokr import Kronecker
from ..lora import Factors, Kind
from ..update import Update
from .product import LowRank, matrix, pair
from .svd import Svd, distance, matrix_svd, needed, norm_squared, product_svd


@dataclass(frozen=True)
class Form:
    """What low-rank factors of a module are like, but for their rank and numbers. `inner`: A's axes after the rank; `axes`: B's."""

    kind: Kind
    inner: tuple[int, ...]
    axes: int = 2
    transposed: bool = False
    groups: int = 1
    parts: tuple[bool, ...] | None = None

    @property
    def across(self) -> bool:
        """Whether the weight is stored as [in, out]."""
        return self.transposed or self.kind == "embedding"

    def factors(self, B: Tensor, A: Tensor, alpha: float, rslora: bool = False) -> Factors:
        """B [out, r] and A [r, -1] in this form."""
        A, B = A.reshape(A.shape[0], *self.inner), B.reshape(*B.shape, *(1,) * (self.axes - 2))
        return Factors(A.contiguous(), B.contiguous(), alpha, self.kind, rslora, self.transposed, self.groups, self.parts)


def form_of(module: str, update: Update) -> Form:
    """The form that an update has, or takes as low-rank factors. AdapterError if no low-rank factors can say the same."""
    if isinstance(update, Factors):
        if update.magnitude is not None:
            raise AdapterError(
                f"'{module}' is a DoRA: its change depends on the base's weight, so it cannot be added or cut by itself\n"
                "  merge it into its base first, and extract the change from the result: lorakit merge, then lorakit extract"
            )
        if update.A.shape[0] != update.B.shape[1]:
            raise AdapterError(
                f"'{module}' is a grouped convolution in PEFT's form, whose A {list(update.A.shape)} reads across the groups: "
                f"no change of the weight does the same\n  leave it out: lorakit.adapter.algebra.edit.prune(adapter, ['{module}']) (lorakit edit IN OUT --drop {module})"
            )
        return Form(update.kind, tuple(update.A.shape[1:]), update.B.dim(), update.transposed, update.groups, update.parts)
    if isinstance(update, Dense) and (update.weight is None or update.weight.dim() < 2):
        what = "a bias" if update.weight is None else f"a vector of {update.weight.numel()}"
        raise AdapterError(f"'{module}' changes {what}, which has no low-rank factors")
    shape = shape_of(update)
    return Form("conv" if len(shape) > 2 else "linear", shape[1:], len(shape))


def shape_of(update: Update) -> tuple[int, ...]:
    """The weight's shape, from the factors alone."""
    if isinstance(update, Dense):
        assert update.weight is not None
        return tuple(update.weight.shape)
    if update.shape is not None:
        return tuple(update.shape)
    if isinstance(update, Hadamard):
        if update.t1 is not None:
            return (update.w1a.shape[1], update.w1b.shape[1], *update.t1.shape[2:])
        return (update.w1a.shape[0], *update.w1b.shape[1:])
    (o1, i1), (out, inner, *k) = _shape(update.w1, update.w1a, update.w1b, None), _shape(update.w2, update.w2a, update.w2b, update.t2)
    return (o1 * out, i1 * inner, *k)


def matrix_of(update: Update, across: bool = False) -> Tensor:
    """ΔW as [out, in·k...], in float32 (float64 stays). `across`: a whole ΔW of another kind is stored as [in, out]."""
    if isinstance(update, Factors):
        A, B = as_matrices(update.A, update.B)
        return (B * update.scale) @ A
    full = update.delta().reshape(shape_of(update)).flatten(1)
    return full.T if across else full


def decompose(update: Update, rank: int | None = None, keep: float | None = None) -> list[Svd]:
    """The singular values of ΔW: one SVD, or one for each adapted part of a packed projection.

    `rank`, `keep`: how much of it is wanted, for those kinds where a part is cheaper than the whole (more may come).
    """
    if isinstance(update, Factors):
        pairs = [(B * update.scale, A) for A, B in blocks(update)]
        return [product_svd(B, A) for B, A in pairs]
    if isinstance(update, Hadamard):
        found = matrix(update)
        return [product_svd(found.left, found.right) if isinstance(found, LowRank) else matrix_svd(found.float(), rank, keep)]
    if isinstance(update, Kronecker):
        return [_kronecker(update, rank, keep)]
    return [matrix_svd(matrix_of(update), rank, keep)]


def compose(
    form: Form, cuts: Sequence[Svd], rank: int, scale: float = 1.0, rslora: bool = False, dtype: torch.dtype = torch.float32
) -> Factors:
    """Low-rank factors out of singular values: B A = ΔW / scale, both halves of equal size; a shorter SVD is padded with zeros."""
    pairs = [_padded(*cut.cut(rank).halves(), rank) for cut in cuts]
    root = 1 / math.sqrt(scale)
    A = narrowed(torch.cat([A * root for _, A in pairs]), dtype, "the factor A of a cut update")
    Bs = [narrowed(B * root, dtype, "the factor B of a cut update") for B, _ in pairs]
    B = expand_packed(torch.stack(Bs), form.parts) if form.parts else Bs[0]
    return form.factors(B, A, scale * (math.sqrt(rank) if rslora else rank), rslora)


def difference(before: Update, after: Factors) -> tuple[float, float]:
    """(‖ΔW - ΔW'‖², ‖ΔW‖²) (Frobenius): between low-rank factors by QR of their halves, with ΔW itself only for the other kinds."""
    A, B = as_matrices(after.A, after.B)
    if not isinstance(before, Factors):
        full = matrix_of(before)
        return distance(full, B * after.scale, A), norm_squared(full)
    A0, B0 = as_matrices(before.A, before.B)
    both = torch.cat([B0.double() * before.scale, B.double() * -after.scale], 1), torch.cat([A0.double(), A.double()])
    # ‖B A‖ = ‖Rb Raᵀ‖. (BᵀB) ∘ (A Aᵀ) would lose what is below 1e-8 of ΔW to cancellation.
    left, right = (torch.linalg.qr(t, mode="r")[1] for t in (both[0], both[1].T))
    return float((left @ right.T).square().sum()), norm_of(before)


def norm_of(f: Factors) -> float:
    """‖ΔW‖² (Frobenius) = Σ (BᵀB) ∘ (A Aᵀ), of r x r matrices."""
    A, B = (t.double() for t in as_matrices(f.A, f.B))
    return max(0.0, float(((B.T @ B) * (A @ A.T)).sum()) * f.scale**2)


def blocks(f: Factors) -> list[tuple[Tensor, Tensor]]:
    """(A [r, in·k], B [rows, r]) as matrices: of each adapted part of a packed projection, else one pair."""
    A, B = as_matrices(f.A, f.B)
    if not f.parts:
        return [(A, B)]
    n, r, size = sum(f.parts), f.rank, B.shape[0] // len(f.parts)
    at = [i for i, adapted in enumerate(f.parts) if adapted]
    return [(A[j * r : (j + 1) * r], B[i * size : (i + 1) * size, j * r : (j + 1) * r]) for j, i in zip(range(n), at, strict=True)]


def _shape(whole: Tensor | None, a: Tensor | None, b: Tensor | None, t: Tensor | None) -> tuple[int, ...]:
    if whole is not None:
        return tuple(whole.shape)
    assert a is not None
    assert b is not None
    return (a.shape[1], b.shape[1], *t.shape[2:]) if t is not None else (a.shape[0], *b.shape[1:])


def _kronecker(update: Kronecker, rank: int | None, keep: float | None) -> Svd:
    """Every product σ1 σ2 is a singular value, with the Kronecker products of the vectors; the largest of them."""

    def side(whole: Tensor | None, a: Tensor | None, b: Tensor | None, t: Tensor | None) -> Svd:
        if whole is not None:
            return matrix_svd(whole.double().flatten(1))
        assert a is not None
        assert b is not None
        return product_svd(*pair(a, b, t))

    first, second = side(update.w1, update.w1a, update.w1b, None), side(update.w2, update.w2a, update.w2b, update.t2)
    values, order = torch.outer(first.S, second.S).flatten().mul(update.scale).sort(descending=True)
    total = first.total * second.total * update.scale**2
    wanted = order[: min(rank or len(order), needed(values, total, keep) if keep is not None else len(order))]
    i, j = wanted // len(second.S), wanted % len(second.S)
    U = torch.einsum("ar,br->abr", first.U[:, i], second.U[:, j]).flatten(0, 1)
    Vt = torch.einsum("ra,rb->rab", first.Vt[i], second.Vt[j]).flatten(1)
    return Svd(U, values[: len(wanted)], Vt, total)


def _padded(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    short = rank - B.shape[1]
    if short <= 0:
        return B, A
    return torch.nn.functional.pad(B, (0, short)), torch.nn.functional.pad(A, (0, 0, 0, short))
