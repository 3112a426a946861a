"""PiSSA (Meng et al. 2024): start from the r largest singular values of W, and train these.

    W = U S Vᵀ        s · B₀ A₀ = U_r S_r V_rᵀ,  each factor with √S_r

A step changes what matters most to W, so the first steps change the loss more than from a random start.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .start import Part, Start
from .svd import first, halves


class Pissa(Start):
    """The r largest singular values."""

    subtracted = True

    def factors(self, part: Part, found: Any) -> tuple[Tensor, Tensor]:
        part.check_rank(part.rank)
        return halves(first(part.W(), part.rank), part.scale)


START = Pissa()
