"""The image demo's measures, on pictures made so that the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lorakit.errors import ConfigError
from lorakit.reproduce.emoji.captions import emoji_list
from lorakit.reproduce.emoji.measures import (
    kinds_of_animals,
    names,
    object_areas,
    pixels,
    share_named,
    statistics,
    style_distance,
)
from lorakit.reproduce.emoji.pictures import scenes
from lorakit.reproduce.emoji.styles import STYLES

WORDS = [emoji.word for emoji in emoji_list()]


class Knows(nn.Module):
    """A judge that sees in picture n the n-th of some words."""

    def __init__(self, *words: str):
        super().__init__()
        self.words = words

    def forward(self, pictures):
        logits = torch.zeros(len(pictures), len(WORDS))
        for row, word in enumerate(self.words):
            logits[row, WORDS.index(word)] = 1
        return logits, torch.zeros(len(pictures), 16)


def test_pixels_keep_rows_columns_and_colours():
    array = np.zeros((2, 3, 3), np.uint8)
    array[1, 2] = 255, 0, 51
    converted = pixels([Image.fromarray(array), Image.new("RGB", (3, 2), "white")])
    assert converted.shape == (2, 3, 2, 3)
    assert converted[0, :, 0, 0].tolist() == [-1, -1, -1]
    torch.testing.assert_close(converted[0, :, 1, 2], torch.tensor([1.0, -1.0, -0.6]))
    assert bool((converted[1] == 1).all())


def test_statistics_are_those_of_numpy():
    pictures = scenes("validation", 3, 8).pictures
    computed = statistics(pictures)
    share = (pictures.double().numpy() + 1) / 2
    np.testing.assert_allclose(computed[:3], share.mean((0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(computed[6:9], share.std((0, 2, 3), ddof=1), atol=1e-5)
    flat = statistics(torch.full((1, 3, 32, 32), 0.5))
    np.testing.assert_allclose(flat, [0.75] * 3 + [0] * 9, atol=1e-6)


@pytest.mark.parametrize("name", STYLES)
def test_style_distance_falls_as_pictures_come_closer_to_the_style(name):
    style = STYLES[name]
    mine, others = scenes("validation", 1, 32).pictures, style(scenes("validation", 2, 32).pictures)
    distances = [style_distance((1 - share) * mine + share * style(mine), others) for share in (0, 0.5, 1)]
    assert style_distance(others, others) == 0
    assert distances == sorted(distances, reverse=True)
    assert distances[2] < 0.4 * distances[0]


@pytest.mark.parametrize("side", [0, 8, 20])
def test_the_area_is_that_of_a_square_on_a_plain_background(side):
    pictures = torch.full((2, 3, 32, 32), -0.5)
    pictures[1] = torch.tensor([0.2, 0.9, -1.0])[:, None, None]
    left = (32 - side) // 2
    pictures[:, :, left : left + side, left : left + side] = torch.tensor([1.0, 0.1, 0.7])[:, None, None]
    pictures += torch.linspace(-0.05, 0.05, 32)  # the background is not quite plain
    assert object_areas(pictures).tolist() == pytest.approx([side**2 / 1024] * 2)


def test_the_judge_is_asked_for_names():
    judge, pictures = Knows("fox", "cat", "pizza", "cat"), torch.zeros(4, 3, 32, 32)
    assert names(judge, pictures) == ["fox", "cat", "pizza", "cat"]
    assert share_named(judge, pictures, ["fox", "cat", "cat", "owl"]) == 0.5
    assert kinds_of_animals(judge, pictures) == ["cat", "fox"]
    with pytest.raises(ConfigError, match="3 words for 4 pictures"):
        share_named(judge, pictures, ["fox", "cat", "cat"])
