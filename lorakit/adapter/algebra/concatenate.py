"""The exact weighted sum of updates of one module.

    Σ wᵢ sᵢ Bᵢ Aᵢ = [w₁s₁B₁ | w₂s₂B₂ | ...] [A₁; A₂; ...]        rank r₁ + r₂ + ...

If all wᵢ sᵢ are equal they stay in alpha and no element changes; otherwise they are multiplied into the Bᵢ in float32.
With a LoHa, a LoKr or a dense ΔW among them, the sum is a dense ΔW. A single update keeps its kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from ...errors import AdapterError
from ..checks import narrowed
from ..dense import Dense
from ..lora import Factors, FactorShapes
from ..update import Update

WeightedUpdate = tuple[float, Update]


def exact_sum(module: str, weighted: Sequence[WeightedUpdate]) -> Update:
    """Return Σ wᵢ ΔWᵢ of one module; dense if any of several updates has no low-rank factors.

    Raises AdapterError if the shapes differ, for a DoRA, and if a dtype cannot hold the result.
    """
    if len(weighted) == 1:
        return weighted[0][1].times(weighted[0][0], module)
    factors = [(w, f) for w, u in weighted if (f := u.factors) is not None]
    if len(factors) == len(weighted):
        return concatenate(common_factor_shapes(module, weighted), factors)  # which refuses a DoRA
    return Dense(_total([(w, u) for w, u in weighted if u.changes_weight], module), _biases(weighted, module))


def concatenate(shapes: FactorShapes, weighted: Sequence[tuple[float, Factors]]) -> Factors:
    """Concatenate the factors, as in the equation above. Raises AdapterError if its dtype cannot hold a scaled B."""
    scales = [w * f.scale for w, f in weighted]
    kept = scales[0] if scales[0] > 0 and all(s == scales[0] for s in scales) else None
    dtype = reduce(
        torch.promote_types,
        [t.dtype for _, f in weighted for t in (f.A, f.B)],
        torch.float32 if kept is None else weighted[0][1].A.dtype,
    )
    As = [f.A.detach().flatten(1).to(dtype) for _, f in weighted]
    Bs = [f.B.detach().flatten(1) for _, f in weighted]
    if kept is None:
        Bs = [
            narrowed(B.double() * s, dtype, f"B times its weight and scale, {s:.3g}")
            for s, B in zip(scales, Bs, strict=True)
        ]
    Bs = [B.to(dtype) for B in Bs]
    n = sum(shapes.parts) if shapes.parts else 1
    # In a packed projection the parts stay together: [part 1 of all; part 2 of all; ...].
    A = torch.cat([a.unflatten(0, (n, -1)) for a in As], 1).flatten(0, 1)
    B = torch.cat([b.unflatten(1, (n, -1)) for b in Bs], 2).flatten(1)
    return shapes.factors(B, A, (kept or 1.0) * (A.shape[0] // n))


def common_factor_shapes(module: str, weighted: Sequence[WeightedUpdate]) -> FactorShapes:
    """Return the factor shapes that all share. Raises AdapterError if their weights have different shapes or kinds."""
    pairs = [(u.factor_shapes(module), u) for _, u in weighted]
    factors = [(s, f) for s, u in pairs if (f := u.factors) is not None]
    first = factors[0][0] if factors else pairs[0][0]
    sizes = {tuple(sorted((u.sizes[0], math.prod(s.inner)))) for s, u in pairs}
    kinds = {(s.kind, s.inner, s.groups, f.B.shape[0]) for s, f in factors}
    if len(sizes) > 1 or len(kinds) > 1:
        descriptions = "; ".join(f"{s.kind}, {u.sizes[0]} x {list(s.inner)}" for s, u in pairs)
        raise AdapterError(
            f"'{module}' has different shapes in the adapters ({descriptions})\n  are they for the same base?"
        )
    same_parts = len(factors) == len(pairs) and all(s.parts == first.parts for s, _ in factors)
    transposed = any(s.transposed for s, _ in factors)  # formats that cannot express it leave it out
    return replace(first, transposed=transposed, parts=first.parts if same_parts else None)


def _total(weighted: Sequence[WeightedUpdate], module: str) -> Tensor | None:
    """Return Σ wᵢ ΔWᵢ in the weight's own layout, in float32."""
    if not weighted:
        return None
    if any(u.is_matrix for _, u in weighted):
        common_factor_shapes(module, weighted)
    deltas = [u.delta().reshape(u.weight_shape()) for _, u in weighted]
    shape = max((tuple(d.shape) for d in deltas), key=len)
    if any(d.numel() != deltas[0].numel() for d in deltas):
        raise AdapterError(
            f"'{module}' has different shapes in the adapters: {', '.join(str(list(d.shape)) for d in deltas)}"
        )
    return sum((w * d.reshape(shape) for (w, _), d in zip(weighted, deltas, strict=True)), torch.zeros(()))


def _biases(weighted: Sequence[WeightedUpdate], module: str) -> Tensor | None:
    biases = [(w, u.tensors()["bias"].float()) for w, u in weighted if u.changes_bias]
    if len({b.shape for _, b in biases}) > 1:
        raise AdapterError(
            f"the bias of '{module}' has different shapes in the adapters: "
            f"{', '.join(str(list(b.shape)) for _, b in biases)}"
        )
    return sum((w * b for w, b in biases), torch.zeros(())) if biases else None
