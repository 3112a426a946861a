"""The canonical form of an adapter, which every LoRA loader applies with the right scale.

    B' = s · B, zero-padded to one rank R for all modules, alpha = R, so that alpha / r = 1 in every module

No patterns, no rsLoRA, no packed parts; docs/export.md says which programs misread them.
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F

from ..adapter.adapter import Adapter
from ..adapter.lora import Factors
from ..adapter.update import Update
from ..config import PRESETS
from ..errors import AdapterError
from ..formats.scale import folded


def canonical(adapter: Adapter, rank: int | None = None) -> Adapter:
    """Return the same adapter with alpha = rank = `rank` in every module (default: its largest rank).

    Raises AdapterError for updates other than LoRA, and if `rank` is too small.
    """
    plain = {module: _plain(module, update) for module, update in adapter.updates.items()}
    largest = max((f.A.shape[0] for f in plain.values()), default=0)
    rank = largest if rank is None else rank
    if rank < largest:
        raise AdapterError(
            f"a module has rank {largest}, more than {rank}\n"
            f"  lorakit resize --rank {rank} lowers it and reports the error"
        )
    factors = {module: _padded(f, rank) for module, f in plain.items()}
    endings = sorted({module.rsplit(".", 1)[-1] for module in factors})
    config = adapter.config.replace(
        rank=max(rank, 1),
        alpha=float(max(rank, 1)),
        rslora=False,
        rank_pattern={},
        alpha_pattern={},
        packed={},
        targets=adapter.config.targets if adapter.config.targets not in PRESETS else endings,
    )
    return replace(adapter, config=config, updates=factors)


def _plain(module: str, update: Update) -> Factors:
    """Return the factors with the scale folded into B and packed parts written out. Raises AdapterError for other kinds
    than LoRA.
    """
    f = update.factors
    if f is None:
        raise AdapterError(
            f"'{module}' has an update that is not low-rank factors\n"
            "  lorakit resize approximates it by factors and reports the error"
        )
    if update.needs_base:
        raise AdapterError(f"'{module}' is a DoRA, whose update depends on the base\n  merge it into the base instead")
    B = folded(f.B, f.scale)
    return Factors(f.A, B, float(f.A.shape[0]), f.kind, transposed=f.transposed, groups=f.groups)


def _padded(f: Factors, rank: int) -> Factors:
    """Return the factors zero-padded to `rank`.

    Raises AdapterError for PEFT's grouped convolutions, whose B is [out, rank / groups].
    """
    missing = rank - f.A.shape[0]
    if not missing:
        return f
    if f.groups > 1 and f.A.shape[0] != f.B.shape[1]:
        raise AdapterError("the factors of a grouped convolution cannot be zero-padded to another rank")
    A = F.pad(f.A, [0, 0] * (f.A.dim() - 1) + [0, missing])
    B = F.pad(f.B, [0, 0] * (f.B.dim() - 2) + [0, missing])
    return replace(f, A=A, B=B, alpha=float(rank))


def is_canonical(adapter: Adapter) -> bool:
    """Whether all modules have the same rank and scale 1."""
    return (
        all(u.variant == "lora" for u in adapter.updates.values())
        and len({f.A.shape[0] for f in adapter.factors.values()}) <= 1
        and all(f.scale == 1 and not f.rslora and f.parts is None for f in adapter.factors.values())
    )
