"""OLoRA (Büyükakyüz 2024): start from an orthonormal B.

    W = Q R        B₀ = the first r columns of Q [out, r],  A₀ = the first r rows of R [r, in·k]

As in PEFT the factors do not depend on the scale, so s · B₀ A₀ is what is subtracted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .start import Part, Start


class Olora(Start):
    """The first r columns of Q and rows of R."""

    subtracted = True

    def factors(self, part: Part, found: Any) -> tuple[Tensor, Tensor]:
        part.check_rank(part.rank)
        Q, R = torch.linalg.qr(part.W())
        return R[: part.rank], Q[:, : part.rank]


START = Olora()
