"""Settings of a concept slider, which is trained from prompts instead of pictures (`slider.py`)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ...config import Strict


class Sliding(Strict):
    """The prompts of a slider, and how far it goes."""

    rows: ClassVar = {
        "slider_positive",
        "slider_negative",
        "slider_target",
        "slider_preserve",
        "slider_strength",
        "slider_steps",
    }

    slider_positive: str = Field(
        "", description="train a concept slider, without pictures: a prompt that has the property, a very old person"
    )
    slider_negative: str = Field("", description="the slider's prompt without it, or with its opposite")
    slider_target: str = Field("", description="what the slider changes: person; default: everything")
    slider_preserve: list[str] = Field(
        default_factory=list, description="words that the slider keeps, each put before all its prompts in turn"
    )
    slider_strength: float = Field(3.0, gt=0, description="how far the slider goes at scale 1")
    slider_steps: int = Field(8, ge=1, description="steps in which the base draws what the slider is trained on")
