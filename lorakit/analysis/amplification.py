"""An adapter's update against the weights of its base, read from the checkpoint one tensor at a time.

    ‖ΔW‖ / ‖W‖                              how large the change is
    ‖Uᵀ W V‖_F                              W in the subspace of ΔW's first r singular directions U, V (Hu et al. 2021, Table 7); and,
                                            to compare with, in that of W's own first r and in one of r random directions
    ‖ΔW‖_F / ‖Uᵀ W V‖_F                     the amplification factor: how much stronger ΔW acts there than W did

W is [out, in], as in `adapter.algebra.spectrum`. A DoRA's ΔW depends on W (`adapter.dora`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.algebra.product import norm
from ..adapter.algebra.spectrum import spectrum
from ..adapter.algebra.svd import random_svd
from ..adapter.update import Update
from ..checkpoint.weights import Weights


def relative_norms(adapter: Adapter, weights: Weights, on_module: Callable[[str], None] | None = None) -> dict[str, float]:
    """Module -> ‖ΔW‖ / ‖W‖; without modules whose W is zero."""
    found = {}
    for module, update in adapter.updates.items():
        if on_module:
            on_module(module)
        weights.across(module, update)  # or it says that the base is another
        size = weights.norm(module)
        if size == 0:
            continue
        found[module] = (norm_on(weights.read(module, update), update) if update.needs_base else norm(update)) / size
    return found


def norm_on(W: Tensor, update: Update) -> float:
    """‖ΔW‖_F of an update whose ΔW depends on W [out, in]."""
    every = slice(0, W.shape[0])
    return float(update.rows(tuple(W.shape), read=lambda: [(every, W)])(every, W).norm())


@dataclass(frozen=True)
class Amplification:
    """One row of the paper's Table 7 for one module. `factor` is ‖ΔW‖ / ‖Uᵀ W V‖ with U, V from ΔW."""

    module: str
    rank: int
    norm_w: float
    norm_delta: float
    in_delta: float
    in_w: float
    in_random: float

    @property
    def factor(self) -> float | None:
        return self.norm_delta / self.in_delta if self.in_delta > 0 else None


def amplification(module: str, update: Update, W: Tensor, rank: int | None = None) -> Amplification:
    """ΔW against W [out, in], in `rank` directions (all that ΔW has, unless said)."""
    found = spectrum(update).strongest(rank)
    n = found.S.numel()
    U, V = found.U.to(W.dtype), found.V.to(W.dtype)
    made = torch.Generator().manual_seed(0)
    P, Q = (torch.linalg.qr(torch.randn(side, n, generator=made, dtype=W.dtype))[0] for side in W.shape)
    own = random_svd(W, n).S if n else W.new_zeros(1)

    def inside(left: Tensor, right: Tensor) -> float:
        return float((left.T @ (W @ right)).norm())

    return Amplification(module, n, float(W.norm()), found.norm, inside(U, V), float(own.norm()), inside(P, Q))
