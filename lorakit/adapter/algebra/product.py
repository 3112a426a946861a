"""An update as the product of two thin matrices, ΔW = L R, L: [out, r], R: [r, in], where it is one; else the matrix itself.

LoRA        s · B A
LoHa        (L₁ R₁) ∘ (L₂ R₂) = (L₁ ⊙ L₂) (R₁ ⊙ R₂), of rank r²: rows of L, and columns of R, multiplied each with each (Khatri-Rao)
LoKr        (L₁ R₁) ⊗ (L₂ R₂) = (L₁ ⊗ L₂) (R₁ ⊗ R₂)

ΔW is meant as the layer uses it: outputs in rows, inputs in columns (a convolution's [out, in/g·k], an embedding's [dim, vocab]). Where
the rank of such a product is no smaller than the matrix, and for a whole ΔW, the matrix itself is taken. Of a DoRA this is s · B A.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..dense import Dense
from ..loha import Hadamard
from ..lokr import Kronecker
from ..lora import Factors
from ..update import Update

# A whole matrix up to here is in float64, a larger one in float32, for memory.
DOUBLE = 1 << 22


@dataclass(frozen=True)
class LowRank:
    left: Tensor  # [out, r]
    right: Tensor  # [r, in]


def matrix(update: Update) -> LowRank | Tensor:
    """ΔW as the product of two thin matrices where it is one, else whole."""
    if isinstance(update, Factors):
        return _of_factors(update)
    if isinstance(update, Hadamard):
        return _of_hadamard(update)
    if isinstance(update, Kronecker):
        return _of_kronecker(update)
    return _of_dense(update)


def inner(a: LowRank | Tensor, b: LowRank | Tensor) -> float:
    """⟨a, b⟩ = Σ a·b over all numbers; of two products through r x r matrices."""
    if isinstance(a, LowRank):
        if isinstance(b, LowRank):
            return float(((a.left.T @ b.left) * (a.right @ b.right.T)).sum())
        return float((a.left.to(b.dtype) * (b @ a.right.T.to(b.dtype))).sum())
    if isinstance(b, LowRank):
        return inner(b, a)
    return float(sum((x.double() * y.double()).sum() for x, y in zip(a.split(256), b.split(256), strict=True)))


def size_of(found: LowRank | Tensor) -> tuple[int, int]:
    """(out, in)."""
    return (found.left.shape[0], found.right.shape[1]) if isinstance(found, LowRank) else (found.shape[0], found.shape[1])


def pair(a: Tensor, b: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """[out, r] and [r, in·k] of one product within a LoHa or LoKr, also in Tucker form; in float64."""
    a, b = a.detach().double(), b.detach().double()
    if core is None:
        return a.flatten(1), b.flatten(1)
    return a.T.contiguous(), torch.einsum("ij...,jn->in...", core.detach().double(), b).flatten(1)


def _of_factors(f: Factors) -> LowRank:
    A, B = f.A.detach().double().flatten(1), f.B.detach().double().flatten(1)
    if A.shape[0] != B.shape[1]:  # PEFT's grouped convolution: each group of outputs reads its own rows of A
        B = torch.block_diag(*B.chunk(f.groups))
    return LowRank(B * f.scale, A)


def _of_hadamard(h: Hadamard) -> LowRank | Tensor:
    """(L₁ R₁) ∘ (L₂ R₂) = (L₁ ⊙ L₂)(R₁ ⊙ R₂): rows of L, and columns of R, multiplied each with each (Khatri-Rao)."""
    (l1, r1), (l2, r2) = pair(h.w1a, h.w1b, h.t1), pair(h.w2a, h.w2b, h.t2)
    if l1.shape[1] * l2.shape[1] >= min(l1.shape[0], r1.shape[1]):
        return _sized((l1 @ r1) * (l2 @ r2) * h.scale)
    left = (l1[:, :, None] * l2[:, None, :]).flatten(1)  # [out, r1·r2]
    right = (r1[:, None, :] * r2[None, :, :]).flatten(0, 1)  # [r1·r2, in]
    return LowRank(left * h.scale, right)


def _of_kronecker(k: Kronecker) -> LowRank | Tensor:
    """(L₁ R₁) ⊗ (L₂ R₂) = (L₁ ⊗ L₂)(R₁ ⊗ R₂)."""
    (l1, r1), (l2, r2) = _half(k.w1, k.w1a, k.w1b), _half(k.w2, k.w2a, k.w2b, k.t2)
    if l1.shape[1] * l2.shape[1] >= min(l1.shape[0] * l2.shape[0], r1.shape[1] * r2.shape[1]):
        return _sized(torch.kron(l1 @ r1, l2 @ r2) * k.scale)
    return LowRank(torch.kron(l1, l2) * k.scale, torch.kron(r1, r2))


def _of_dense(d: Dense) -> Tensor:
    weight = d.weight if d.weight is not None else torch.zeros(1, 1)  # a change of the bias alone
    return _sized(weight.detach().flatten(1) if weight.dim() > 1 else weight.detach()[:, None])


def _half(whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if whole is None:
        assert a is not None
        assert b is not None
        return pair(a, b, core)
    M = whole.detach().double().flatten(1)
    rows, columns = M.shape
    one = torch.eye(min(rows, columns), dtype=M.dtype)
    return (one, M) if rows <= columns else (M, one)


def _sized(M: Tensor) -> Tensor:
    return M.to(torch.float64 if M.numel() <= DOUBLE else torch.float32)
