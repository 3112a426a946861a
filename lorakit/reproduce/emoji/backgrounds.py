"""Backgrounds at 32 x 32: ten plain colours and six drawn scenes, each a little different every time.

All functions return pixels [32, 32, 3], float32 in 0..1. Edges are drawn one pixel soft, which stands for antialiasing.
The colours keep away from Twemoji's own (strawberry, sun, leaf and whale), so that an object is never lost in them.
"""

from __future__ import annotations

import numpy as np

SIZE = 32
Y, X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)

COLOURS = {
    "red": (160, 22, 34),
    "orange": (255, 170, 95),
    "yellow": (253, 236, 150),
    "green": (30, 110, 62),
    "blue": (42, 72, 190),
    "purple": (98, 48, 148),
    "pink": (255, 190, 214),
    "gray": (128, 130, 134),
    "white": (252, 252, 252),
    "black": (4, 4, 6),
}


def colour(*rgb: float) -> np.ndarray:
    return np.asarray(rgb, np.float32) / 255


def fade(top: np.ndarray, bottom: np.ndarray, until: float = SIZE) -> np.ndarray:
    """From one colour at the top to another in row `until`."""
    share = np.clip(Y / until, 0, 1)[..., None]
    return top * (1 - share) + bottom * share


def paint(picture: np.ndarray, cover: np.ndarray, paint_colour: np.ndarray) -> np.ndarray:
    """`cover` [32, 32] in 0..1: where, and how opaque."""
    cover = cover[..., None]
    return picture * (1 - cover) + paint_colour * cover


def below(line: np.ndarray) -> np.ndarray:
    """Cover of all that is below a line, given as a height per column."""
    return np.clip(Y - line + 0.5, 0, 1)


def disc(x: float, y: float, radius: float) -> np.ndarray:
    return np.clip(radius - np.hypot(X - x, Y - y) + 0.5, 0, 1)


def dots(rng: np.random.Generator, count: int, top: float, bottom: float) -> np.ndarray:
    """Cover of single pixels scattered between two rows."""
    cover = np.zeros((SIZE, SIZE), np.float32)
    cover[rng.integers(int(top), int(bottom), count), rng.integers(0, SIZE, count)] = 1
    return cover


def waves(rng: np.random.Generator, height: float, swing: float, length: float) -> np.ndarray:
    """A wavy line around a height, one value a column."""
    return height + swing * np.sin(2 * np.pi * (X[0] / length + rng.random()))


def plain(name: str, rng: np.random.Generator) -> np.ndarray:
    return np.broadcast_to(np.clip(colour(*COLOURS[name]) + rng.normal(0, 0.008, 3), 0, 1), (SIZE, SIZE, 3))


def meadow(rng: np.random.Generator) -> np.ndarray:
    picture = fade(colour(150, 205, 250), colour(220, 240, 255), 18)
    picture = paint(picture, below(waves(rng, rng.uniform(15, 18), 2, 40)), colour(120, 190, 90))
    picture = paint(picture, below(waves(rng, rng.uniform(21, 23), 1.5, 28)), colour(80, 155, 65))
    picture = paint(picture, dots(rng, 4, 24, SIZE), colour(255, 235, 120))
    return paint(picture, dots(rng, 3, 24, SIZE), colour(250, 250, 250))


def sea(rng: np.random.Generator) -> np.ndarray:
    picture = fade(colour(225, 240, 248), colour(250, 250, 240), 14)
    horizon = rng.uniform(13, 16)
    picture = paint(picture, below(np.full(SIZE, horizon)), colour(30, 120, 160))
    for line in np.arange(horizon + 4, SIZE, 5):
        crest = np.abs(Y - waves(rng, line, 0.8, 9)) < 0.5
        picture = paint(picture, crest * 0.7, colour(150, 215, 230))
    return picture


def desert(rng: np.random.Generator) -> np.ndarray:
    picture = fade(colour(120, 195, 215), colour(235, 235, 205), 16)
    picture = paint(picture, disc(rng.uniform(4, 28), rng.uniform(3, 6), 2.5), colour(255, 250, 215))
    picture = paint(picture, below(waves(rng, rng.uniform(15, 18), 2.5, 32)), colour(226, 190, 125))
    return paint(picture, below(waves(rng, rng.uniform(22, 25), 2, 24)), colour(202, 160, 96))


def snow(rng: np.random.Generator) -> np.ndarray:
    picture = fade(colour(122, 142, 165), colour(176, 192, 208), 20)
    picture = paint(picture, below(waves(rng, rng.uniform(19, 22), 1.2, 36)), colour(238, 243, 248))
    return paint(picture, dots(rng, 12, 0, SIZE), colour(255, 255, 255))


def night(rng: np.random.Generator) -> np.ndarray:
    picture = fade(colour(8, 10, 38), colour(30, 36, 88), 26)
    picture = paint(picture, dots(rng, 10, 0, 22) * 0.9, colour(255, 250, 220))
    x, y = rng.choice((4.5, 27.5)), rng.uniform(4, 6)
    moon = disc(x, y, 3.2) * (1 - disc(x + 1.6, y - 0.8, 2.8))
    picture = paint(picture, moon, colour(250, 240, 190))
    return paint(picture, below(waves(rng, rng.uniform(25, 27), 1, 30)), colour(10, 22, 30))


def sunset(rng: np.random.Generator) -> np.ndarray:
    horizon = rng.uniform(20, 23)
    top, middle, low = colour(92, 50, 120), colour(232, 100, 96), colour(255, 196, 110)
    picture = np.where(Y[..., None] < horizon / 2, fade(top, middle, horizon / 2), 0)
    share = np.clip((Y - horizon / 2) / (horizon / 2), 0, 1)[..., None]
    picture = np.where(Y[..., None] < horizon / 2, picture, middle * (1 - share) + low * share)
    picture = paint(picture, disc(rng.uniform(6, 26), horizon, 5), colour(255, 240, 160))
    return paint(picture, below(np.full(SIZE, horizon)), colour(58, 34, 66))


SCENES = {"meadow": meadow, "sea": sea, "desert": desert, "snow": snow, "night": night, "sunset": sunset}


def draw(name: str, rng: np.random.Generator) -> np.ndarray:
    """A background by its name in `captions.BACKGROUNDS`: [32, 32, 3], float32 in 0..1."""
    return (SCENES[name](rng) if name in SCENES else plain(name, rng)).astype(np.float32)
