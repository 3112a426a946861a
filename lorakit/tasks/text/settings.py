"""Settings that text tasks share."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ...config import Auto, Strict, at_least_one


class Columns(Strict):
    rows: ClassVar = {"columns"}

    columns: dict[str, str] = Field(
        default_factory=dict,
        description="your column names, if different: {prompt: question, completion: answer}; numbers from 1 for a "
        "table without a header: {text: 4, label: 2}",
    )

    @field_validator("columns", mode="before")
    @classmethod
    def _column_numbers(cls, value: Any) -> Any:
        """Take numbers as YAML gives them."""
        if not isinstance(value, dict):
            return value
        return {ours: str(own) if type(own) is int else own for ours, own in value.items()}


class Labels(Strict):
    rows: ClassVar = {"labels"}

    labels: list[str] = Field(
        default_factory=list, description="label names, in the order of their ids; default: those of the data, sorted"
    )


class Prompts(Strict):
    free: ClassVar = {"sample_prompts"}

    sample_prompts: list[str] = Field(
        default_factory=list,
        description="prompts for samples at each evaluation, of base and adapter; default: two held-out rows, or the "
        "pictures' captions",
    )


class LongContext(Strict):
    rope_scaling: str | None = Field(
        None,
        description="scale the base's rotary positions, for rows longer than it was trained for: yarn:4 or linear:4; "
        "the adapter remembers it",
    )

    @field_validator("rope_scaling")
    @classmethod
    def _rope_scaling(cls, value: str | None) -> str | None:
        from ...bases.rope import parsed

        if value is not None:
            kind, factor = parsed(value)
            value = f"{kind}:{factor:g}"
        return value


class Sampling(Strict):
    """How text is generated: for samples during training, and by `lorakit predict`."""

    free: ClassVar = {"sample_tokens", "sample_temperature", "sample_top_p", "sample_beams"}

    sample_tokens: int = Field(64, ge=0, description="tokens per sample; 0: no samples")
    sample_temperature: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="temperature of samples; 0: the most likely token each time"
    )
    sample_top_p: float = Field(
        1.0, gt=0, le=1, description="draw samples from the likeliest tokens of this probability"
    )
    sample_beams: int = Field(1, ge=1, description="beams of samples; 1: no beam search")

    @model_validator(mode="after")
    def _beams_or_chance(self) -> Sampling:
        if self.sample_beams > 1 and self.sample_temperature > 0:
            raise ValueError(
                f"sample_beams: {self.sample_beams} searches for the likeliest text, and sample_temperature: "
                f"{self.sample_temperature:g} draws one; remove one of the two"
            )
        return self


class MaxLength(Strict):
    rows: ClassVar = {"max_length"}

    max_length: int | Auto = Field(
        "auto", description="longest row in tokens; auto: the data's 99th percentile; with pictures, the longest row"
    )

    _max_length = field_validator("max_length")(at_least_one)


class Lengths(MaxLength):
    rows: ClassVar = {"on_long"}

    on_long: Literal["auto", "drop", "cut", "split"] = Field(
        "auto", description="what to do with longer rows: drop, cut, or (plain text) split them"
    )
