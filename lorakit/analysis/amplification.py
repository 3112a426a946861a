"""Compare an adapter's updates with its base's weights, which are read from the checkpoint one tensor at a time.

    ‖ΔW‖ / ‖W‖              relative size of the change
    ‖Uᵀ W V‖_F              W projected onto ΔW's first r singular directions U, V (Hu et al. 2021, Table 7); for
                            comparison, also onto W's own first r and onto r random directions
    ‖ΔW‖_F / ‖Uᵀ W V‖_F     the amplification factor: how much larger ΔW is there than W

W is [out, in], as in `adapter.algebra.spectrum`. For a DoRA, ΔW = m (W + s B A) / ‖W + s B A‖ - W.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapter.adapter import Adapter, Other
from ..adapter.algebra.product import LowRank, matrix
from ..adapter.algebra.spectrum import norm, spectrum
from ..adapter.algebra.svd import random_svd
from ..adapter.lora import Factors
from ..checkpoint.weights import Weights


def relative_norms(adapter: Adapter, weights: Weights, on_module: Callable[[str], None] | None = None) -> dict[str, float]:
    """‖ΔW‖ / ‖W‖ per module, without modules whose W is zero. Raises if a module does not fit the base's weights."""
    ratios = {}
    for module, update in adapter.updates.items():
        if on_module:
            on_module(module)
        weights.across(module, update)  # raises if the base is a different one
        size = weights.norm(module)
        if size == 0:
            continue
        if isinstance(update, Factors) and update.magnitude is not None:
            change = dora_change(weights.read(module, update), update)
        else:
            change = norm(update)
        ratios[module] = change / size
    return ratios


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


def amplification(module: str, update: Factors | Other, W: Tensor, rank: int | None = None) -> Amplification:
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
