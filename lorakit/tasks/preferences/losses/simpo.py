"""SimPO, simple preference optimization (Meng et al. 2024, arXiv 2405.14734, equation 6).

    loss = −(1 − ε) log σ(β h − γ) − ε log σ(γ − β h)
    h    = log π(chosen) / |chosen| − log π(rejected) / |rejected|

There is no reference. ε is `label_smoothing`, 0 in the paper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..loss import Scores

if TYPE_CHECKING:
    from torch import Tensor

    from ..settings import LossSettings

summary = "log-probability per token with a margin, without a reference"
answers = 2
has_reference = False
beta = 2.0  # the paper has 2 to 2.5, and a margin of about half of it
uses = frozenset({"beta", "label_smoothing", "sft_weight", "simpo_gamma"})


def losses(scores: Scores, own: LossSettings) -> Tensor:
    import torch.nn.functional as F

    means = scores.means  # [n, 2]
    margin = own.beta_value * (means[:, 0] - means[:, 1]) - own.simpo_gamma  # [n]
    smoothing = own.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def rewards(scores: Scores, own: LossSettings) -> Tensor:
    """β log π per token."""
    return own.beta_value * scores.means.detach()
