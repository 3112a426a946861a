"""Pictures with captions: an emoji, flipped or not, large or small, somewhere on a background.

The batch of a step is a function of (SEED, purpose, step) alone, so a resumed run sees what an unbroken one sees.
Pixels are [n, 3, 32, 32], float32 in -1..1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .backgrounds import SIZE, draw
from .captions import BACKGROUNDS, OBJECTS, SMALL_SHARE, TWEMOJI, emoji_list, held_out, random_caption

SEED = 20211017  # the day version 2 of the LoRA paper appeared
SMALL, LARGE = (13, 16), (23, 28)  # side of the emoji in pixels, first and last
PURPOSES = ("denoiser", "autoencoder", "judge", "projection", "validation")


@dataclass
class Batch:
    pictures: Tensor  # [n, 3, 32, 32]
    captions: list[str]
    things: Tensor  # [n], index into the emoji list
    backgrounds: Tensor  # [n]


def generator(purpose: str, step: int) -> np.random.Generator:
    return np.random.default_rng((SEED, PURPOSES.index(purpose), step))


@cache
def sprites() -> list[dict[int, np.ndarray]]:
    """For each emoji of the sheet its pixels at every size in use: [side, side, 4], float32 in 0..1."""
    with Image.open(TWEMOJI / "emoji.png") as file:
        sheet = file.convert("RGBA")
    columns = sheet.width // SIZE
    sides = [*range(SMALL[0], SMALL[1] + 1), *range(LARGE[0], LARGE[1] + 1)]
    found = []
    for at in range(len(emoji_list())):
        left, top = at % columns * SIZE, at // columns * SIZE
        emoji = sheet.crop((left, top, left + SIZE, top + SIZE))
        resized = {side: emoji.resize((side, side), Image.Resampling.LANCZOS) for side in sides}
        found.append({side: np.asarray(picture, np.float32) / 255 for side, picture in resized.items()})
    return found


def paste(background: np.ndarray, thing: int, small: bool, rng: np.random.Generator) -> np.ndarray:
    """The background [32, 32, 3] with the emoji on it. A large one is near the middle, a small one anywhere inside."""
    low, high = SMALL if small else LARGE
    side = int(rng.integers(low, high + 1))
    sprite = sprites()[thing][side]
    if rng.random() < 0.5:
        sprite = sprite[:, ::-1]
    room = SIZE - side
    left, top = (int(rng.integers(room // 4, room - room // 4 + 1)) for _ in range(2))
    picture = background.copy()
    alpha = sprite[..., 3:]
    spot = picture[top : top + side, left : left + side]
    spot[:] = spot * (1 - alpha) + sprite[..., :3] * alpha
    return picture


def to_tensor(pictures: list[np.ndarray]) -> Tensor:
    """[n, 32, 32, 3] in 0..1 to [n, 3, 32, 32] in -1..1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous() * 2 - 1


def scenes(purpose: str, step: int, count: int, held: bool = False, unseen: bool = False) -> Batch:
    """`count` pictures. `held`: pairs that are held out may be among them; `unseen`: all emoji of the sheet may."""
    rng = generator(purpose, step)
    emoji, names = emoji_list(), list(BACKGROUNDS)
    pictures: list[np.ndarray] = []
    captions: list[str] = []
    things: list[int] = []
    backgrounds: list[int] = []
    while len(pictures) < count:
        thing = int(rng.integers(len(emoji) if unseen else len(OBJECTS)))
        background = int(rng.integers(len(names)))
        if emoji[thing].seen and held_out(thing, background) and not held:
            continue
        small = bool(rng.random() < SMALL_SHARE)
        pictures.append(paste(draw(names[background], rng), thing, small, rng))
        captions.append(random_caption(rng, emoji[thing], names[background], small))
        things.append(thing)
        backgrounds.append(background)
    return Batch(to_tensor(pictures), captions, torch.tensor(things), torch.tensor(backgrounds))
