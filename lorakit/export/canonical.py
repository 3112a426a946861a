"""The plainest form of an adapter: every program that reads LoRA gives it the right strength.

    B' = s · B, zeros up to one rank R for all modules, alpha = R, so that alpha / r = 1 wherever it is looked for

No patterns, no rsLoRA, no packed parts: what programs misread of these is in docs/export.md.
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F

from ..adapter.adapter import Adapter
from ..adapter.lora import Factors
from ..errors import AdapterError
from ..formats.strength import folded


def canonical(adapter: Adapter, rank: int | None = None) -> Adapter:
    """The adapter with alpha = rank = `rank` in every module (by default the largest rank it has). AdapterError where that cannot be."""
    if adapter.others:
        raise AdapterError(
            f"'{next(iter(adapter.others))}' has an update that is not low-rank factors\n  lorakit resize makes factors of it, and says how near they are"
        )
    folded = {module: _plain(module, f) for module, f in adapter.factors.items()}
    most = max((f.A.shape[0] for f in folded.values()), default=0)
    rank = most if rank is None else rank
    if rank < most:
        raise AdapterError(
            f"a module has rank {most}, which does not fit {rank}\n  lorakit resize --rank {rank} makes it smaller, and says what is lost"
        )
    factors = {module: _padded(f, rank) for module, f in folded.items()}
    endings = sorted({module.rsplit(".", 1)[-1] for module in factors})
    config = adapter.config.replace(
        rank=max(rank, 1), alpha=float(max(rank, 1)), rslora=False, rank_pattern={}, alpha_pattern={}, packed={},
        targets=adapter.config.targets if adapter.config.targets != "all-linear" else endings,
    )  # fmt: skip
    return replace(adapter, config=config, updates=factors)


def _plain(module: str, f: Factors) -> Factors:
    """Scale 1, and the update that a packed one is."""
    if f.needs_base:
        raise AdapterError(
            f"'{module}' is a DoRA: its strength depends on the base, so no plain factors are the same\n  merge it into the base instead"
        )
    B = folded(f.B, f.scale)
    return Factors(f.A, B, float(f.A.shape[0]), f.kind, transposed=f.transposed, groups=f.groups)


def _padded(f: Factors, rank: int) -> Factors:
    """With zeros up to this rank. (PEFT's B of a grouped convolution holds rank / groups.)"""
    missing = rank - f.A.shape[0]
    if not missing:
        return f
    if f.groups > 1 and f.A.shape[0] != f.B.shape[1]:
        raise AdapterError("a grouped convolution's factors cannot be filled up to another rank")
    A = F.pad(f.A, [0, 0] * (f.A.dim() - 1) + [0, missing])
    B = F.pad(f.B, [0, 0] * (f.B.dim() - 2) + [0, missing])
    return replace(f, A=A, B=B, alpha=float(rank))


def is_canonical(adapter: Adapter) -> bool:
    """Whether every module has one rank and the scale 1."""
    return (
        all(u.variant == "lora" for u in adapter.updates.values())
        and len({f.A.shape[0] for f in adapter.factors.values()}) <= 1
        and all(f.scale == 1 and not f.rslora and f.parts is None for f in adapter.factors.values())
    )
