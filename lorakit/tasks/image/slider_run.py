"""A run that trains a concept slider from prompts: its rows, batches and losses, in place of those of pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...bases.pipeline import PipelineModel
from ...errors import ConfigError
from ...generate.eval_mode import evaluating
from ..task import Data
from .encoded import Pictures
from .latents import encode_pictures
from .slider import SliderPrompts, SliderSettings, slider_losses, slider_prompts

NO_DATA = "none"  # the setting `data` of a run without pictures


@dataclass(frozen=True)
class SliderRow:
    """One row of a slider's batch. All are alike: what is drawn of them differs by step. `group`: width and height."""

    group: tuple[int, int]
    slider: SliderSettings
    number: int

    weight = 1
    is_prior = False

    @property
    def size(self) -> int:
        """Its pixels."""
        return self.group[0] * self.group[1]

    @property
    def where(self) -> str:
        return f"the slider's prompts, row {self.number}"

    @property
    def caption(self) -> str:
        """What samples are drawn of."""
        return self.slider.target or self.slider.positive

    def in_epoch(self, seed: int, epoch: int) -> SliderRow:
        return self

    def digest(self) -> bytes:
        return hashlib.sha256(f"{self.group} {self.slider.model_dump()}".encode()).digest()


class Slider(Pictures):
    """A run's pipeline and its slider's prompts."""

    prompts_encoded: SliderPrompts
    shape: tuple[int, ...]  # of a picture's latents

    @property
    def slider(self) -> SliderSettings:
        own = self.settings
        return SliderSettings(
            positive=own.slider_positive,
            negative=own.slider_negative or " ",
            target=own.slider_target,
            preserve=own.slider_preserve,
            strength=own.slider_strength,
            denoise_steps=own.slider_steps,
        )

    def data(self) -> Data:
        """Return the rows of a step. Raises ConfigError for settings that a slider does not have."""
        config, own = self.config, self.settings
        if config.data != NO_DATA:
            raise ConfigError(
                f"data: {config.data}: a slider is trained from prompts\n  leave out the pictures, or slider_positive"
            )
        if own.new_tokens or own.prior_count or own.prior_data is not None:
            raise ConfigError("a slider has no pictures, so it takes no new_tokens and no prior pictures")
        resolution, multiple = self.sizes()
        side = resolution if own.resolution == "auto" else max(multiple, int(own.resolution) // multiple * multiple)
        rows = [SliderRow((side, side), self.slider, number) for number in range(1, config.batch_size + 1)]
        prompts = f"'{own.slider_positive}' against '{own.slider_negative}', in '{own.slider_target}'"
        return Data(rows, [], f"a slider, {prompts}", [("pictures", f"{side}x{side}, drawn by the base")])

    def prepare(self, model: PipelineModel, items: Iterable[Any]) -> None:
        """Encode the prompts. Raises TrainError for a pipeline that cannot be trained."""
        side = next(iter(items)).group[0]
        self.shape = tuple(encode_pictures(self.pipe, torch.zeros(1, 3, side, side)).shape[1:])
        with evaluating(model):
            self.prompts_encoded = slider_prompts(self.pipe, self.slider)

    def collate(self, rows: Sequence[Any]) -> dict[str, Any]:
        return {"of": self, "rows": len(rows)}

    def losses(self, model: PipelineModel, batch: Mapping[str, Any]) -> Tensor:
        return slider_losses(model, self.shape, self.prompts_encoded, self.slider, self.diffusion, batch["rows"])
