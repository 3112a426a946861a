"""A batch of the embedded image model's pictures is a function of its purpose and number."""

from __future__ import annotations

import torch

from lorakit.reproduce.emoji.captions import OBJECTS, emoji_list
from lorakit.reproduce.emoji.pictures import scenes, sprites


def test_the_sheet_holds_every_emoji_of_the_list():
    assert len(OBJECTS) == 48
    assert len(sprites()) == len(emoji_list()) == len({emoji.word for emoji in emoji_list()}) == 72
    for sprite in sprites():
        assert all(0.1 < pixels[..., 3].mean() < 1 for pixels in sprite.values())


def test_a_batch_depends_on_its_step_and_purpose_alone():
    first, again = scenes("denoiser", 3, 4), scenes("denoiser", 3, 4)
    assert torch.equal(first.pictures, again.pictures)
    assert first.captions == again.captions
    for other in (scenes("denoiser", 4, 4), scenes("judge", 3, 4)):
        assert not torch.equal(first.pictures, other.pictures)
