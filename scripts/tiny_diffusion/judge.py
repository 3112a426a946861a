"""The judge's training: pictures of every emoji, some in other styles, some blurred or with noise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.reproduce.emoji.captions import BACKGROUNDS, emoji_list
from lorakit.reproduce.emoji.judge import Judge, measure_on_real_pictures
from lorakit.reproduce.emoji.pictures import SEED, scenes
from lorakit.reproduce.emoji.styles import STYLED_SHARE, some_styled

from .latents import Projection
from .loop import Part

ROWS = 64


def new_judge() -> Judge:
    torch.manual_seed(SEED)
    return Judge(len(emoji_list()), len(BACKGROUNDS))


def judge_part(projection: Projection, rows: int = ROWS) -> Part:
    model = new_judge()

    def loss(step: int) -> Tensor:
        batch = scenes("judge", step, rows, held=True, unseen=True)
        pictures = some_styled(batch.pictures)
        generator = torch.Generator().manual_seed(SEED + step)
        # Samples have an autoencoder's faults: some pictures are blurred by the projection, some get noise.
        blurred = torch.rand(rows, 1, 1, 1, generator=generator) < 0.4
        pictures = torch.where(blurred, projection.decode(projection.encode(pictures)), pictures)
        strength = 0.15 * torch.rand(rows, 1, 1, 1, generator=generator) ** 2
        pictures = (pictures + strength * torch.randn(pictures.shape, generator=generator)).clamp(-1, 1)
        things, backgrounds = model(pictures)
        plain = rows - round(rows * STYLED_SHARE)
        return F.cross_entropy(things, batch.things) + F.cross_entropy(backgrounds[:plain], batch.backgrounds[:plain])

    return Part("judge", model, loss, learning_rate=2e-3, validate=measure_on_real_pictures)
