"""A run that trains a concept slider from prompts: its rows, batches and losses, in place of those of pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...bases.pipeline import PipelineModel
from ...config import part
from ...data.pictures.buckets import Grid
from ...data.pictures.settings import PictureSettings
from ...generate.eval_mode import evaluating
from ..task import Data
from .encoded import Pictures
from .fit import check_fit
from .latents import encode_pictures
from .prompts import batch_prompts
from .slider import SliderPrompts, SliderSettings, prompt_texts, slider_losses, slider_prompts


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
        """Return the rows of a step. Raises ConfigError for a resolution that the pipeline cannot take."""
        own = self.settings
        side = Grid.of(part(own, PictureSettings), *self.sizes()).resolution
        rows = [SliderRow((side, side), self.slider, number) for number in range(1, self.config.batch_size + 1)]
        prompts = f"'{own.slider_positive}' against '{own.slider_negative}', in '{own.slider_target}'"
        return Data(rows, [], f"a slider, {prompts}", [("pictures", f"{side}x{side}, drawn by the base")])

    def prepare(self, model: PipelineModel, items: Iterable[Any]) -> None:
        """Encode the prompts. Raises TrainError for a pipeline that cannot be trained, ConfigError for settings that do
        not fit it.
        """
        check_fit(model, self.diffusion)
        side = next(iter(items)).group[0]
        self.shape = tuple(encode_pictures(self.pipe, torch.zeros(1, 3, side, side)).shape[1:])
        with evaluating(model):
            self.prompts_encoded = slider_prompts(self.pipe, self.slider)
        self._find_layout(model, torch.zeros(self.shape), batch_prompts(self.prompts_encoded.target[:1]))
        self._warn_of_cut(text for texts in prompt_texts(self.slider) for text in texts)

    def collate(self, rows: Sequence[Any]) -> dict[str, Any]:
        return {"of": self, "rows": len(rows)}

    def losses(self, model: PipelineModel, batch: Mapping[str, Any]) -> Tensor:
        return slider_losses(model, self.shape, self.prompts_encoded, self.slider, self.diffusion, batch["rows"])
