"""One scale for all modules of a file, for formats that have no other: the rest of a module's scale goes into its B.

s · B A  =  s₀ · (s/s₀ · B) A
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..adapter.checks import narrowed
from ..adapter.lora import Factors
from ..config import LoraConfig


def clean(value: float) -> float:
    """`value` without the rounding of a division and its inverse: 32 / 49 · 49 is not quite 32."""
    return float(f"{value:.12g}")


def commonest(values: Iterable[float]) -> float:
    """The most frequent value; the first of several."""
    return Counter(values).most_common(1)[0][0]


def folded(B: Tensor, ratio: float) -> Tensor:
    """`ratio` · B: in B's dtype if that holds every element exactly, else in float32 (or wider).
    AdapterError if a value is too large for that too.
    """
    if ratio == 1:
        return B
    exact = B.double() * ratio
    rounded = exact.to(B.dtype)
    if torch.equal(rounded.double(), exact):
        return rounded
    return narrowed(exact, torch.promote_types(B.dtype, torch.float32), f"a scale of {ratio:.3g}, folded into B")


def with_alpha_as_rank(f: Factors) -> Factors:
    """The factors with their scale folded into B (alpha = rank); both in float32 if B's dtype would round it. The parts
    of a packed projection are written out.
    """
    if f.scale == 1 and not f.rslora and not f.parts:
        return f
    B = folded(f.B, f.scale)
    A = f.A.to(torch.promote_types(f.A.dtype, B.dtype))
    return Factors(A, B, float(f.A.shape[0]), f.kind, transposed=f.transposed, groups=f.groups)


def config_of(factors: Mapping[str, Factors], **known: Any) -> LoraConfig:
    """The `LoraConfig` of these factors: the most common rank and alpha, patterns for the others, targets by name
    ending. `known`: other fields of the config. AdapterError if factors are malformed.
    """
    for module, f in factors.items():
        f.check(module)
    ranks, alphas = {m: f.rank for m, f in factors.items()}, {m: f.alpha for m, f in factors.items()}
    rank, alpha = int(commonest(ranks.values())), commonest(alphas.values())
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        targets=sorted({m.rsplit(".", 1)[-1] for m in factors}),
        rank_pattern={f"^{m}": r for m, r in ranks.items() if r != rank},
        alpha_pattern={f"^{m}": a for m, a in alphas.items() if a != alpha},
        packed={m: list(f.parts) for m, f in factors.items() if f.parts},
        **known,
    )
