"""KTO, Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306, equation 7).

    loss = λ_D (1 − σ(β (r − z)))   of a desirable answer          r = log π/π_ref
           λ_U (1 − σ(β (z − r)))   of an undesirable one          z = max(0, mean of r over mismatched rows)

z estimates the KL divergence of the model from its reference. A mismatched row is a prompt with another prompt's
answer; z is the mean over all rows of the step, and no gradient goes through it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..loss import Scores

if TYPE_CHECKING:
    from torch import Tensor

    from ..settings import LossSettings

summary = "Kahneman-Tversky optimization, of answers with a label, or of pairs taken apart"
answers = 1
has_reference = True
beta = 0.1
uses = frozenset({"beta", "desirable_weight", "undesirable_weight"})


def losses(scores: Scores, own: LossSettings) -> Tensor:
    import torch

    assert scores.desirable is not None
    assert scores.kl is not None
    gain = own.beta_value * (scores.ratios[:, 0] - scores.kl)  # [n]
    desirable = own.desirable_weight * (1 - torch.sigmoid(gain))
    undesirable = own.undesirable_weight * (1 - torch.sigmoid(-gain))
    return torch.where(scores.desirable, desirable, undesirable)


def rewards(scores: Scores, own: LossSettings) -> Tensor:
    """β log π/π_ref, as DPO's."""
    return own.beta_value * scores.ratios.detach()
