"""MiLoRA (Wang et al. 2024): start from the r smallest singular values of W, and leave the others as they are.

    W = U S Vᵀ        s · B₀ A₀ = the last r values of the sum,  each factor with √S

What the base knows is in the large singular values, so new things are learnt beside it. Both factors are small at
first, hence so are the first steps: it needs a higher learning rate than PiSSA.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .start import Part, Start
from .svd import halves, last


class Milora(Start):
    """The r smallest singular values."""

    subtracted = True

    def factors(self, part: Part, found: Any) -> tuple[Tensor, Tensor]:
        part.check_rank(part.rank)
        return halves(last(part.W(), part.rank), part.scale)


START = Milora()
