"""Settings of a concept slider, which is trained from prompts instead of pictures (`slider.py`)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from ...config import RunSettings, Strict
from ...data.pictures.settings import PictureSettings
from ...errors import ConfigError
from ...nondefault import nondefault
from ..text.settings import Columns

NO_DATA = "none"  # the setting `data` of a run without pictures
# A slider uses none of these: it encodes its prompts once, and draws its own pictures.
_OF_PICTURES = (
    *(name for cls in (PictureSettings, Columns) for name in cls.model_fields if name != "resolution"),
    "split",
    "noise_offset",
    "new_tokens",
    "prior_count",
    "cache",
)


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
    slider_steps: int = Field(
        8, ge=1, le=1000, description="steps in which the base draws what the slider is trained on"
    )

    @model_validator(mode="after")
    def _of_a_slider(self) -> Sliding:
        given = nondefault(self, (n for n in Sliding.model_fields if n != "slider_positive"))
        if given and not self.slider_positive:
            raise ValueError(f"{given[0]} is for a slider; give slider_positive, the prompt that has the property")
        return self


def check_slider(config: RunSettings) -> None:
    """Raise ConfigError for settings of a slider's run that would have no effect, or that it cannot be trained with."""
    if config.data != NO_DATA:
        raise ConfigError(
            f"data: {config.data}: a slider is trained from prompts\n  leave out the pictures, or slider_positive"
        )
    if config.gradient_checkpointing:
        raise ConfigError(
            "gradient_checkpointing: a slider cannot be trained with it, as the forward pass would be computed again "
            "after the adapter's scale has changed\n  remove gradient_checkpointing"
        )
    from ...bases.pipeline import is_text_encoder

    encoders = [name for name in getattr(config, "components", None) or () if is_text_encoder(name)]
    if encoders:
        raise ConfigError(
            f"components: {encoders[0]}: a slider's prompts are encoded once, so text encoders are not trained\n"
            "  leave out the text encoders"
        )
    unused = [*nondefault(config, _OF_PICTURES), *(["validation"] if config.validation else [])]
    if unused:
        raise ConfigError(
            f"{unused[0]}: a slider is trained without pictures, so it has no effect\n  remove {', '.join(unused)}"
        )
