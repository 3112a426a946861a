"""DPO, direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

    loss = −(1 − ε) log σ(β h) − ε log σ(−β h)          h = log π/π_ref (chosen) − log π/π_ref (rejected)

ε is `label_smoothing`, 0 in the paper; conservative DPO (Mitchell 2023) takes it for the share of pairs that are the
wrong way round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..loss import Scores

if TYPE_CHECKING:
    from torch import Tensor

    from ..settings import LossSettings

summary = "direct preference optimization"
answers = 2
has_reference = True
beta = 0.1
uses = frozenset({"beta", "label_smoothing", "sft_weight"})


def losses(scores: Scores, own: LossSettings) -> Tensor:
    import torch.nn.functional as F

    ratios = scores.ratios  # [n, 2]
    margin = own.beta_value * (ratios[:, 0] - ratios[:, 1])  # [n]
    smoothing = own.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def rewards(scores: Scores, own: LossSettings) -> Tensor:
    """β log π/π_ref (equation 5, up to a term that depends on the prompt alone)."""
    return own.beta_value * scores.ratios.detach()
