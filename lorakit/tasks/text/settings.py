"""Settings that text tasks share."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from ...config import Auto, Strict, at_least_one


class Columns(Strict):
    rows: ClassVar = {"columns"}

    columns: dict[str, str] = Field(
        default_factory=dict, description="your column names, if different: {prompt: question, completion: answer}"
    )


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


class Lengths(Strict):
    rows: ClassVar = {"max_length", "on_long"}

    max_length: int | Auto = Field("auto", description="longest row in tokens; auto: the data's 99th percentile")
    on_long: Literal["auto", "drop", "cut", "split"] = Field(
        "auto", description="what to do with longer rows: drop, cut, or (plain text) split them"
    )

    _max_length = field_validator("max_length")(at_least_one)
