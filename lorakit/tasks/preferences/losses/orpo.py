"""ORPO, odds ratio preference optimization (Hong et al. 2024, arXiv 2403.07691, equations 6 and 7).

    loss = −log P(chosen) − λ log σ(log odds(chosen) − log odds(rejected))          odds = P / (1 − P)

log P is log π per token (equation 1 of the paper). There is no reference: the first term is supervised training's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..loss import Scores

if TYPE_CHECKING:
    from torch import Tensor

    from ..settings import LossSettings

summary = "supervised loss and odds ratio, without a reference"
answers = 2
has_reference = False
beta = None
uses = frozenset({"orpo_lambda"})


def losses(scores: Scores, own: LossSettings) -> Tensor:
    import torch.nn.functional as F

    means = scores.means  # [n, 2]
    log_odds = means - _log_of_rest(means)
    return -means[:, 0] - own.orpo_lambda * F.logsigmoid(log_odds[:, 0] - log_odds[:, 1])


def _log_of_rest(log_p: Tensor) -> Tensor:
    """Return log(1 − p). Near p = 1 by expm1, elsewhere by log1p: neither loses digits there (Mächler 2012)."""
    import torch

    near = log_p > -math.log(2)
    # Each branch gets values that it can take: a gradient of the other one would be NaN, and 0 · NaN is NaN. The least
    # float32 below 0 stands for 0, where a probability has been rounded to 1.
    close = torch.where(near, log_p, -1.0).clamp(max=-(2.0**-24))
    far = torch.where(near, -1.0, log_p)
    return torch.where(near, torch.log(-torch.expm1(close)), torch.log1p(-torch.exp(far)))


def rewards(scores: Scores, own: LossSettings) -> Tensor:
    """λ log P."""
    return own.orpo_lambda * scores.means.detach()
