"""What a LoRA did to pictures, as numbers: style, objects, kinds of animals, size.

Pixels are [n, 3, 32, 32], float32 in -1..1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...errors import ConfigError
from .captions import emoji_list
from .judge import Judge
from .styles import edges

DIFFERENT = 0.2  # of the distance between black and white: a pixel this far from the background is the object's


def pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """Return pictures of one size as pixels."""
    arrays = np.stack([np.asarray(picture.convert("RGB"), np.float32) for picture in pictures])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous() / 127.5 - 1


def statistics(pictures: Tensor) -> Tensor:
    """Return mean and standard deviation, over all pixels, of the colours and of how much they change: [12].

    Style as in Huang and Belongie 2017, equation 13, of plain pixels and edges instead of a network's features.
    """
    share = (pictures.clamp(-1, 1) + 1) / 2
    features = torch.cat([share, edges(pictures)], 1)  # [n, 6, 32, 32]
    return torch.cat([features.mean((0, 2, 3)), features.std((0, 2, 3))])


def style_distance(pictures: Tensor, reference: Tensor) -> float:
    """Return the distance between the statistics of some pictures and those of pictures in the style; 0: the same."""
    return float((statistics(pictures) - statistics(reference)).norm())


@torch.no_grad()
def names(judge: Judge, pictures: Tensor) -> list[str]:
    """Return the object that the judge sees in each picture, of 72."""
    emoji = emoji_list()
    return [emoji[number].word for number in judge(pictures)[0].argmax(1).tolist()]


def share_named(judge: Judge, pictures: Tensor, words: Sequence[str]) -> float:
    """Return the share of the pictures in which the judge sees the object asked for, one word a picture.

    Raises ConfigError for another number of words than pictures.
    """
    if len(words) != len(pictures):
        raise ConfigError(f"{len(words)} words for {len(pictures)} pictures; expected one each")
    return sum(name == word for name, word in zip(names(judge, pictures), words, strict=True)) / len(words)


def kinds_of_animals(judge: Judge, pictures: Tensor) -> list[str]:
    """Return the animals that the judge sees in the pictures, each once, the most frequent first."""
    animals = {emoji.word for emoji in emoji_list() if emoji.kind == "animal"}
    seen = [name for name in names(judge, pictures) if name in animals]
    return sorted(set(seen), key=lambda name: (-seen.count(name), name))


def object_areas(pictures: Tensor) -> Tensor:
    """Return the share of each picture that is not its background: [n]. For plain backgrounds only.

    The background's colour is the median of the outermost pixels.
    """
    border = torch.cat(
        [pictures[..., 0, :], pictures[..., -1, :], pictures[..., 0], pictures[..., -1]], -1
    )  # [n, 3, 128]
    background = border.median(-1).values[..., None, None]
    distance = (pictures - background).norm(dim=1) / np.sqrt(12)  # black to white: 2 in each channel
    return (distance > DIFFERENT).float().mean((1, 2))
