"""IPO, identity preference optimization (Azar et al. 2023, arXiv 2310.12036, equation 17).

    loss = (h − 1 / 2β)²          h = log π/π_ref (chosen) / |chosen| − log π/π_ref (rejected) / |rejected|

β is the paper's τ. The ratios are per token: the paper leaves that open, and its authors confirmed it for TRL, as sums
would make the loss grow with the square of an answer's length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..loss import Scores

if TYPE_CHECKING:
    from torch import Tensor

    from ..settings import LossSettings

summary = "identity preference optimization"
answers = 2
has_reference = True
beta = 0.1
uses = frozenset({"beta", "sft_weight"})


def losses(scores: Scores, own: LossSettings) -> Tensor:
    ratios = scores.ratios / scores.tokens  # [n, 2]
    return (ratios[:, 0] - ratios[:, 1] - 1 / (2 * own.beta_value)).square()


def rewards(scores: Scores, own: LossSettings) -> Tensor:
    """β log π/π_ref per token, so that their difference is what the loss pulls towards 1/2."""
    return own.beta_value * scores.ratios.detach() / scores.tokens
