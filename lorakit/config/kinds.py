"""Settings of one kind of update, one start or one way of training. Given with another kind, they are an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from .short_names import stands_for
from .virtual_tokens import VIRTUAL, VirtualKind, VirtualTokenSettings

# Virtual tokens are had alone, or beside LoRA.
_VIRTUAL = tuple((name, kind) for name in ("variant", "prompt", "method") for kind in VIRTUAL)

# setting -> the settings and values that it needs (any one of them)
_NEEDS: dict[str, tuple[tuple[str, str], ...]] = {
    "adalora_rank": (("variant", "adalora"),),
    "adalora_warmup": (("variant", "adalora"),),
    "adalora_final": (("variant", "adalora"),),
    "adalora_every": (("variant", "adalora"),),
    "adalora_penalty": (("variant", "adalora"),),
    "lokr_factor": (("variant", "lokr"),),
    "lokr_both": (("variant", "lokr"),),
    "vera_seed": (("variant", "vera"),),
    "vera_start": (("variant", "vera"),),
    "eva_rho": (("init", "eva"),),
    "init_batches": (("init", "eva"), ("init", "lora_ga")),
    **dict.fromkeys(VirtualTokenSettings.model_fields, _VIRTUAL),
}
# setting -> the settings and values beside which it has no effect, with why
_WITHOUT: dict[str, tuple[tuple[str, Any, str], ...]] = {
    "lora_plus": (("freeze_a", True, "it is B's learning rate as a multiple of A's, and A is not trained"),)
}


def has_effect(setting: str, values: Mapping[str, Any]) -> bool:
    """Whether a setting has an effect with these other ones, as far as that depends on the kind of update and start."""
    values = {**values, **stands_for(values)}
    if any(values.get(name) == value for name, value, _ in _WITHOUT.get(setting, ())):
        return False
    needs = _NEEDS.get(setting, ())
    return not needs or any(values.get(name) == value for name, value in needs)


def needed(setting: str) -> dict[str, str]:
    """Return settings with which this one has an effect; empty if it always has."""
    return dict(_NEEDS.get(setting, ())[:1])


class KindSettings(VirtualTokenSettings):
    """The settings of `LoraSettings` that only some kinds of update (`variant`) or starts (`init`) have."""

    lora_plus: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="LoRA+: B's learning rate as a multiple of A's, such as 16"
    )
    freeze_a: bool = Field(False, description="LoRA-FA: train B alone; A keeps its random start")
    adalora_rank: int | None = Field(
        None, ge=1, description="AdaLoRA's average rank at the end (default: half of rank, where it starts)"
    )
    adalora_warmup: float = Field(0.1, ge=0, lt=1, description="AdaLoRA: share of the steps before ranks are reduced")
    adalora_final: float = Field(0.5, ge=0, lt=1, description="AdaLoRA: share of the steps after ranks are settled")
    adalora_every: int = Field(1, ge=1, description="AdaLoRA: steps between two reductions of the ranks")
    adalora_penalty: float = Field(
        0.5, ge=0, allow_inf_nan=False, description="AdaLoRA: weight of the penalty on factors that are not orthogonal"
    )
    lokr_factor: int | None = Field(
        None, ge=2, description="LoKr: size of the smaller factor (default: as square as the sizes allow)"
    )
    lokr_both: bool = Field(False, description="LoKr: the smaller factor is a product of low rank too")
    vera_seed: int = Field(0, ge=0, description="VeRA: seed of the random matrices that all modules share")
    vera_start: float = Field(0.1, allow_inf_nan=False, description="VeRA: the vector d's value at the start")
    eva_rho: float = Field(
        2.0, ge=1, allow_inf_nan=False, description="EVA: a module's rank is at most this many times rank"
    )
    init_batches: int = Field(8, ge=1, description="EVA, LoRA-GA: batches of training data that the start is made from")
    prompt: VirtualKind | None = Field(
        None, description="virtual tokens beside LoRA: prefix, prompt or p_tuning, trained together with it"
    )

    @model_validator(mode="after")
    def _belong(self):
        own = dict(self)
        alone = next((f"{name}='{own[name]}'" for name in ("variant", "method") if own.get(name) in VIRTUAL), None)
        if self.prompt is not None and alone is not None:
            raise ValueError(
                f"prompt='{self.prompt}' adds virtual tokens to LoRA, and {alone} trains them alone; give one of them"
            )
        for setting, others in _WITHOUT.items():
            if own[setting] != type(self).model_fields[setting].default and not has_effect(setting, own):
                name, value, why = next(each for each in others if own[each[0]] == each[1])
                raise ValueError(f"{setting} has no effect with {name}={value}: {why}; remove one of them")
        for setting, needs in _NEEDS.items():
            changed = own[setting] != type(self).model_fields[setting].default
            if changed and not has_effect(setting, own):
                accepted = " or ".join(f"{name}='{value}'" for name, value in needs)
                if needs is _VIRTUAL:
                    accepted = f"virtual tokens (variant, prompt or method {', '.join(VIRTUAL)})"
                raise ValueError(f"{setting} has an effect with {accepted} only; remove it, or give that")
        if self.adalora_warmup + self.adalora_final >= 1:
            raise ValueError(
                f"adalora_warmup ({self.adalora_warmup:g}) and adalora_final ({self.adalora_final:g}) leave no steps "
                "to reduce ranks in; together they must be below 1"
            )
        if self.adalora_rank is not None and self.adalora_rank > own.get("rank", self.adalora_rank):
            raise ValueError(
                f"adalora_rank ({self.adalora_rank}) is the average rank at the end, and cannot be higher than rank "
                f"({own['rank']}), the one at the start"
            )
        return self

    def of_variant(self, variant: str) -> Self:
        """Return the settings of updates of another kind, without those that only the kind so far has."""
        own = {name for name, needs in _NEEDS.items() if ("variant", dict(self)["variant"]) in needs}
        kept = {name: value for name, value in self if name in self.model_fields_set - own}
        return type(self)(**kept | {"variant": variant})
