"""One strength for a whole file, where the format has no other: the rest of each module's own goes into its B.

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
    """Without the noise of a division and its reverse: 32 / 49 · 49 is not quite 32."""
    return float(f"{value:.12g}")


def commonest(values: Iterable[float]) -> float:
    """The value that most modules have; the first of these."""
    return Counter(values).most_common(1)[0][0]


def folded(B: Tensor, ratio: float) -> Tensor:
    """`ratio` · B: in B's precision if every number of it can be held there, in float32 (or wider) otherwise.
    AdapterError if not even there.
    """
    if ratio == 1:
        return B
    exact = B.double() * ratio
    here = exact.to(B.dtype)
    if torch.equal(here.double(), exact):
        return here
    return narrowed(exact, torch.promote_types(B.dtype, torch.float32), f"a strength of {ratio:.3g}, folded into B")


def config_of(factors: Mapping[str, Factors], **known: Any) -> LoraConfig:
    """The `LoraConfig` that factors imply: the commonest rank and alpha, patterns for the others, targets by name
    ending. AdapterError if one is malformed.
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
