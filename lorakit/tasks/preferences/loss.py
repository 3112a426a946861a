"""The interface of a preference loss. Each file of `losses/` defines these names.

    log π(y|x) = Σ log p(token | tokens before it)      over the answer's tokens, its end token included

Such a file imports torch inside its functions only, so that `lorakit --help` stays quick.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from .settings import LossSettings


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the answers of n rows, float32, each [n, k]: k = 2 for (chosen, rejected), else 1.

    `policy`: log π of the model in training, with its gradient; `reference`: log π of the model before training, 0 for
    losses without a reference; `tokens`: of each answer. Of single answers: `desirable`: [n]; `kl`: KTO's estimate, a
    scalar.
    """

    policy: Tensor
    reference: Tensor
    tokens: Tensor
    desirable: Tensor | None = None
    kl: Tensor | None = None

    @property
    def ratios(self) -> Tensor:
        """log π / π_ref: [n, k]."""
        return self.policy - self.reference

    @property
    def means(self) -> Tensor:
        """log π per token: [n, k]."""
        return self.policy / self.tokens


class Loss(Protocol):
    """A preference loss."""

    summary: str  # in the help of --loss
    answers: int  # of a row: 2, compared with each other, or 1
    has_reference: bool  # whether it compares with the model before training
    beta: float | None  # the default of `beta`; None: it has none
    uses: Collection[str]  # the settings of `LossSettings` that have an effect, besides `loss`

    def losses(self, scores: Scores, own: LossSettings) -> Tensor:
        """Return the loss of each row: [n], float32."""

    def rewards(self, scores: Scores, own: LossSettings) -> Tensor:
        """Return the reward that the loss implies for each answer, without gradient: [n, k]."""
