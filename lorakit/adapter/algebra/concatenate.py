"""The exact weighted sum of updates of one module.

    Σ wᵢ sᵢ Bᵢ Aᵢ = [w₁s₁B₁ | w₂s₂B₂ | ...] [A₁; A₂; ...]        rank r₁ + r₂ + ...

Where all wᵢ sᵢ are equal they stay in alpha, and no number changes; else they are multiplied into the Bᵢ in float32.
With a LoHa, a LoKr or a whole ΔW among them, the sum is a whole ΔW. One alone stays of its kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from ...errors import AdapterError
from ..checks import narrowed
from ..dense import Dense
from ..lora import Factors, Form
from ..update import Update

Piece = tuple[float, Update]  # its weight, and the update


def exact_sum(module: str, pieces: Sequence[Piece]) -> Update:
    """The sum in the module's form; a whole update if one of several is no product of low-rank factors."""
    if len(pieces) == 1:
        return pieces[0][1].times(pieces[0][0], module)
    factors = [(w, f) for w, u in pieces if (f := u.factors) is not None]
    if len(factors) == len(pieces):
        return concatenate(common_form(module, pieces), factors)  # which refuses a DoRA
    return Dense(_total([(w, u) for w, u in pieces if u.changes_weight], module), _biases(pieces, module))


def concatenate(form: Form, pieces: Sequence[tuple[float, Factors]]) -> Factors:
    scales = [w * f.scale for w, f in pieces]
    kept = scales[0] if scales[0] > 0 and all(s == scales[0] for s in scales) else None
    dtype = reduce(
        torch.promote_types,
        [t.dtype for _, f in pieces for t in (f.A, f.B)],
        torch.float32 if kept is None else pieces[0][1].A.dtype,
    )
    As = [f.A.detach().flatten(1).to(dtype) for _, f in pieces]
    Bs = [f.B.detach().flatten(1) for _, f in pieces]
    if kept is None:
        Bs = [
            narrowed(B.double() * s, dtype, f"B times its weight and strength, {s:.3g}")
            for s, B in zip(scales, Bs, strict=True)
        ]
    Bs = [B.to(dtype) for B in Bs]
    n = sum(form.parts) if form.parts else 1
    # Of a packed projection the parts stay together: [part 1 of all; part 2 of all; ...].
    A = torch.cat([a.unflatten(0, (n, -1)) for a in As], 1).flatten(0, 1)
    B = torch.cat([b.unflatten(1, (n, -1)) for b in Bs], 2).flatten(1)
    return form.factors(B, A, (kept or 1.0) * (A.shape[0] // n))


def common_form(module: str, pieces: Sequence[Piece]) -> Form:
    """The form that all have. AdapterError if their weights are of different shapes or kinds."""
    forms = [u.form(module) for _, u in pieces]
    factors = [(form, f) for form, (_, u) in zip(forms, pieces, strict=True) if (f := u.factors) is not None]
    first = factors[0][0] if factors else forms[0]
    sizes = {tuple(sorted((u.sizes[0], math.prod(form.inner)))) for form, (_, u) in zip(forms, pieces, strict=True)}
    kinds = {(form.kind, form.inner, form.groups, f.B.shape[0]) for form, f in factors}
    if len(sizes) > 1 or len(kinds) > 1:
        told = "; ".join(
            f"{form.kind}, {u.sizes[0]} x {list(form.inner)}" for form, (_, u) in zip(forms, pieces, strict=True)
        )
        raise AdapterError(f"'{module}' is of different shapes in the adapters ({told})\n  are they for the same base?")
    same_parts = len(factors) == len(pieces) and all(form.parts == first.parts for form, _ in factors)
    transposed = any(form.transposed for form, _ in factors)  # a format that cannot say so leaves it out
    return Form(first.kind, first.inner, first.axes, transposed, first.groups, first.parts if same_parts else None)


def _total(pieces: Sequence[Piece], module: str) -> Tensor | None:
    """Σ wᵢ ΔWᵢ in the weight's own layout, in float32."""
    if not pieces:
        return None
    if any(u.is_matrix for _, u in pieces):
        common_form(module, pieces)
    deltas = [u.delta().reshape(u.weight_shape()) for _, u in pieces]
    shape = max((tuple(d.shape) for d in deltas), key=len)
    if any(d.numel() != deltas[0].numel() for d in deltas):
        raise AdapterError(
            f"'{module}' is of different shapes in the adapters: {', '.join(str(list(d.shape)) for d in deltas)}"
        )
    return sum((w * d.reshape(shape) for (w, _), d in zip(pieces, deltas, strict=True)), torch.zeros(()))


def _biases(pieces: Sequence[Piece], module: str) -> Tensor | None:
    biases = [(w, u.tensors()["bias"].float()) for w, u in pieces if u.changes_bias]
    if len({b.shape for _, b in biases}) > 1:
        raise AdapterError(
            f"the bias of '{module}' is of different shapes in the adapters: "
            f"{', '.join(str(list(b.shape)) for _, b in biases)}"
        )
    return sum((w * b for w, b in biases), torch.zeros(())) if biases else None
