"""Compare an adapter's updates with its base's weights, which are read from the checkpoint one tensor at a time.

    ‖ΔW‖ / ‖W‖              relative size of the change
    ‖Uᵀ W V‖_F              W projected onto ΔW's first r singular directions U, V (Hu et al. 2021, Table 7); for
                            comparison, also onto W's own first r and onto r random directions
    ‖ΔW‖_F / ‖Uᵀ W V‖_F     the amplification factor: how much larger ΔW is there than W

W is [out, in], as in `adapter.algebra.spectrum`. The ΔW of a DoRA depends on W (see `adapter.dora`).
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


def relative_norms(
    adapter: Adapter, weights: Weights, on_module: Callable[[str], None] | None = None
) -> dict[str, float]:
    """‖ΔW‖ / ‖W‖ per module, without modules whose W is zero. Raises if a module does not fit the base's weights."""
    ratios = {}
    for module, update in adapter.updates.items():
        if on_module:
            on_module(module)
        size = weights.norm(module)  # raises if the base is a different one
        if size == 0:
            continue
        ratios[module] = (norm_on(weights.read(module), update) if update.needs_base else norm(update)) / size
    return ratios


def norm_on(W: Tensor, update: Update) -> float:
    """‖ΔW‖_F of an update whose ΔW depends on W [out, in]."""
    every = slice(0, W.shape[0])
    return float(update.rows(tuple(W.shape), read=lambda: [(every, W)])(every, W).norm())


@dataclass(frozen=True)
class Amplification:
    """One module's row of the paper's Table 7: ‖UᵀWV‖ with U, V of ΔW (`in_delta`), W (`in_w`) and random.

    `factor`: the amplification factor ‖ΔW‖ / `in_delta`.
    """

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
    """Compare ΔW with W [out, in] in ΔW's first `rank` singular directions (default: all)."""
    delta = spectrum(update).strongest(rank)
    n = delta.S.numel()
    U, V = delta.U.to(W.dtype), delta.V.to(W.dtype)
    generator = torch.Generator().manual_seed(0)
    P, Q = (torch.linalg.qr(torch.randn(side, n, generator=generator, dtype=W.dtype))[0] for side in W.shape)
    own = random_svd(W, n).S if n else W.new_zeros(1)

    def projected(left: Tensor, right: Tensor) -> float:
        return float((left.T @ (W @ right)).norm())

    return Amplification(module, n, float(W.norm()), delta.norm, projected(U, V), float(own.norm()), projected(P, Q))
