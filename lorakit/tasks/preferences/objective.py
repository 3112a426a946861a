"""A run's loss with its settings, every 'auto' resolved, and what is logged of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...config import RunSettings, part
from .loss import Loss, Scores
from .losses import loss_of
from .settings import AUTO, LossSettings, check_settings

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """What a run minimizes. `own`: with the loss's name, and with a beta if it has one."""

    own: LossSettings

    @property
    def loss(self) -> Loss:
        return loss_of(self.own.loss)

    def losses(self, scores: Scores) -> Tensor:
        """Return the loss of each row: [n], float32.

        With `sft_weight` α > 0, −α log π(chosen) / |chosen| is added (RPO, Pang et al. 2024, arXiv 2404.19733, eq. 2).
        """
        losses = self.loss.losses(scores, self.own)
        return losses - self.own.sft_weight * scores.means[:, 0] if self.own.sft_weight else losses

    def figures(self, scores: Scores) -> dict[str, Tensor]:
        """Return what is logged of each row, by name: [n], NaN where it does not concern the row."""
        rewards = self.loss.rewards(scores, self.own)  # [n, k]
        if rewards.shape[1] == 2:
            margin = rewards[:, 0] - rewards[:, 1]
            return {
                "reward_chosen": rewards[:, 0],
                "reward_rejected": rewards[:, 1],
                "reward_margin": margin,
                "reward_accuracy": (margin > 0).float(),
            }
        assert scores.desirable is not None
        assert scores.kl is not None
        reward, nan = rewards[:, 0], float("nan")
        right = (scores.ratios[:, 0] > scores.kl) == scores.desirable
        return {
            "reward_chosen": reward.where(scores.desirable, nan),
            "reward_rejected": reward.where(~scores.desirable, nan),
            "reward_accuracy": right.float(),
            "kl": scores.kl.expand(len(reward)),
        }

    def facts(self) -> str:
        """Describe it for the start panel: "dpo, beta 0.1"."""
        shown = [f"{name} {value:g}" for name, value in self.recorded().items() if name != "loss"]
        return ", ".join([self.own.loss, *shown])

    def recorded(self) -> dict[str, Any]:
        """Return the settings that have an effect, for the result's metadata."""
        values = self.own.model_dump()
        zero = {"label_smoothing", "sft_weight"}  # without an effect at 0
        names = [name for name in LossSettings.model_fields if name in {"loss", *self.loss.uses}]
        return {name: values[name] for name in names if name not in zero or values[name]}


def objective_of(config: RunSettings, answers: int) -> Objective:
    """Return a run's objective. `answers`: of the data's rows, 2 or 1, which decides loss: auto.

    Raises ConfigError for settings that the loss does not have.
    """
    given = part(config, LossSettings)
    name = AUTO[answers] if given.loss == "auto" else given.loss
    loss = loss_of(name)
    own = given.replace(loss=name)
    check_settings(own)
    return Objective(own if loss.beta is None or own.beta != "auto" else own.replace(beta=loss.beta))
