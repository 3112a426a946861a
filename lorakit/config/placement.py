"""Settings that choose modules of a model: those that get an update, and those that are trained in full."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from .strict import Strict, check_pattern

ALL_LINEAR = "all-linear"
NONE = "none"  # adapts nothing: only biases, `save_modules` or `trainable_tokens` are trained
PRESETS = (
    ALL_LINEAR,
    NONE,
    "attention",
    "houlsby",
    "ia3",
    "kohya",
    "locon",
    "pfeiffer",
)  # sets of targets by name, others in layers/presets.py


class Saved(Strict):
    """Modules that are trained in full, beside what a method adapts."""

    save_modules: list[str] = Field(
        default_factory=list, description="modules to train and save in full (PEFT's modules_to_save)"
    )


class Narrowed(Saved):
    """Which of the modules that a method would adapt it leaves out."""

    exclude: str | list[str] | None = Field(
        None, description="modules to skip: name endings, or one regular expression"
    )
    layers: list[int] | None = Field(
        None, description="only these layer numbers: the first number in a module's name, after two names at least"
    )
    layers_pattern: list[str] = Field(
        default_factory=list,
        description="with layers: the names before the layer's number, such as h or blocks (default: any)",
    )

    @field_validator("exclude")
    @classmethod
    def _exclude(cls, value: str | list[str] | None) -> str | list[str] | None:
        return _names_or_regex(value)

    @model_validator(mode="after")
    def _pattern_needs_layers(self):
        for pattern in self.layers_pattern:
            check_pattern(pattern)
        if self.layers_pattern and self.layers is None:
            raise ValueError("layers_pattern says where the numbers of layers are; give layers too")
        return self


class Placement(Narrowed):
    """Which modules a method adapts."""

    targets: str | list[str] = Field(
        ALL_LINEAR,
        description="modules to adapt: all-linear, none, attention, houlsby, ia3, kohya, locon, pfeiffer, name "
        "endings, or one regular expression for full names",
    )
    components: list[str] | None = Field(
        None, min_length=1, description="components of a pipeline to adapt, such as unet; default: its denoiser"
    )
    strict_targets: bool = Field(True, description="a target that no module matches is an error; false: list it")

    @field_validator("targets")
    @classmethod
    def _targets(cls, value: str | list[str]) -> str | list[str]:
        return _names_or_regex(value)


def _names_or_regex(value: Any) -> Any:
    """Validate name endings, a preset or a regular expression. Raises ValueError otherwise."""
    if isinstance(value, list):
        if not value or not all(value):
            raise ValueError("expected at least one name ending, and none of them empty")
        return sorted(dict.fromkeys(value))
    if isinstance(value, str) and value not in PRESETS:
        check_pattern(value)
    return value
