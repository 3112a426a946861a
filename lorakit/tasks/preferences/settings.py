"""Settings of preference losses. A setting that the chosen loss does not have is an error."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from pydantic import Field

from ...config import Auto, Strict
from ...errors import ConfigError
from ...nondefault import nondefault
from .losses import loss_names, loss_of

LOSSES = loss_names()
AUTO = {2: "dpo", 1: "kto"}  # by the number of answers that the data's rows have

# The losses are found at run time by listing their folder.
if TYPE_CHECKING:
    LossName: TypeAlias = str
else:
    LossName = Literal["auto", *LOSSES]


def _having(setting: str) -> str:
    return ", ".join(name for name in LOSSES if setting in loss_of(name).uses)


class LossSettings(Strict):
    rows: ClassVar = {"loss"}  # kto takes pairs apart
    anew: ClassVar = {
        "loss",
        "beta",
        "label_smoothing",
        "sft_weight",
        "simpo_gamma",
        "orpo_lambda",
        "desirable_weight",
        "undesirable_weight",
    }

    loss: LossName = Field(
        "auto",
        description="; ".join(f"{name}: {loss_of(name).summary}" for name in LOSSES)
        + "; auto: dpo for pairs, kto for answers with a label",
    )
    beta: float | Auto = Field(
        "auto",
        description="what a change of the log-probabilities counts in the loss: the higher, the closer the model stays "
        "to its reference; auto: "
        + ", ".join(f"{loss_of(name).beta:g} for {name}" for name in LOSSES if "beta" in loss_of(name).uses),
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description=f"{_having('label_smoothing')}: the share of pairs taken to be the wrong way round",
    )
    sft_weight: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description=f"{_having('sft_weight')}: add this times the chosen answer's loss per token (RPO's alpha), which "
        "keeps it likely",
    )
    simpo_gamma: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="simpo: the margin by which the chosen answer's reward must lead"
    )
    orpo_lambda: float = Field(
        0.1, ge=0, allow_inf_nan=False, description="orpo: the weight of the odds ratio beside the supervised loss"
    )
    desirable_weight: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="kto: the weight of the losses of desirable answers"
    )
    undesirable_weight: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="kto: the weight of the losses of undesirable answers"
    )

    @property
    def beta_value(self) -> float:
        """`beta`, where `objective_of` has resolved it."""
        return float(self.beta)


def check_settings(own: LossSettings) -> None:
    """Raise ConfigError for settings that the loss does not have, or a beta that is not positive.

    For loss: auto, those that none of its losses has.
    """
    names = AUTO.values() if own.loss == "auto" else (own.loss,)
    uses = {setting for name in names for setting in loss_of(name).uses}
    for setting in nondefault(own, sorted(LossSettings.model_fields.keys() - {"loss", *uses})):
        raise ConfigError(
            f"{setting}: {getattr(own, setting)}: loss: {own.loss} does not have it\n"
            f"  omit {setting}, or use one of the losses that have it: {_having(setting)}"
        )
    if own.beta != "auto" and not 0 < own.beta < float("inf"):
        raise ConfigError(f"beta: {own.beta}: expected a positive number, such as 0.1")
