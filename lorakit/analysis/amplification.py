"""An adapter's update against the weights of its base, read from the checkpoint one tensor at a time.

    ‖ΔW‖ / ‖W‖                              how large the change is
    ‖Uᵀ W V‖_F                              W in the subspace of ΔW's first r singular directions U, V (Hu et al. 2021, Table 7); and,
                                            to compare with, in that of W's own first r and in one of r random directions
    ‖ΔW‖_F / ‖Uᵀ W V‖_F                     the amplification factor: how much stronger ΔW acts there than W did

W is [out, in], as in `adapter.algebra.spectrum`. A DoRA's ΔW is what its magnitude makes of W: m (W + s B A) / ‖W + s B A‖ - W.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.algebra.product import LowRank, matrix
from ..adapter.algebra.spectrum import norm, spectrum
from ..adapter.algebra.svd import random_svd
from ..adapter.lora import Factors
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
        if isinstance(update, Factors) and update.magnitude is not None:
            change = dora_change(weights.read(module, update), update)
        else:
            change = norm(update)
        found[module] = change / size
    return found


def dora_change(W: Tensor, f: Factors) -> float:
    """‖W' - W‖_F of a DoRA on W [out, in]."""
    assert f.magnitude is not None
    low = matrix(f)
    assert isinstance(low, LowRank)
    V = W.double() + low.left @ low.right
    magnitude = f.magnitude.detach().double()
    lengths = V.norm(dim=1, keepdim=True) if magnitude.shape == (V.shape[0], 1) else V.norm(dim=0, keepdim=True)
    return float((V * torch.where(lengths > 0, magnitude / lengths, 0) - W).norm())


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
