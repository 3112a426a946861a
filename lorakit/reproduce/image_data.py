"""The image demo's training pictures: folders of PNG files with captions, as `lorakit image train` reads them.

style/      24 objects, each once, in a style that the base never draws
subject/    6 pictures of one animal that the base has never seen, called "a kin animal"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ..io.atomic import replacing, write_text
from .emoji.backgrounds import draw
from .emoji.captions import OBJECTS, emoji_list, prompt
from .emoji.pictures import paste, to_tensor

STYLE_PICTURES, SUBJECT_PICTURES = 24, 6
SCENES = ("meadow", "sea", "snow", "red", "sunset", "white", "green", "night")
SUBJECT = "fox"
# A word that the base does not know, as DreamBooth takes one (Ruiz et al. 2023, section 3.2). It is one token; the
# usual "sks" would be three, which push the scene's words to positions at which the base has never seen them, and the
# background is lost (with one token it is right in 16 of 16 samples of the base).
RARE = "kin"


def style_objects() -> tuple[list[str], list[str]]:
    """Return the objects in the style's pictures, and the objects that are kept for measuring: every other one."""
    words = [emoji.word for emoji in OBJECTS]
    return words[1::2], words[0::2]


def subject_prompt(background: str | None = None) -> str:
    """`subject_prompt("meadow")` is "a kin animal in a meadow"."""
    return f"a {RARE} {class_prompt(background).removeprefix('an ')}"


def class_prompt(background: str | None = None) -> str:
    """`class_prompt("meadow")` is "an animal in a meadow"."""
    return prompt("animal", background)


def draw_real(things: Sequence[str], backgrounds: Sequence[str], seed: int) -> Tensor:
    """Return drawn pictures, large objects, one for each pair: [n, 3, 32, 32] in -1..1."""
    numbers = {emoji.word: number for number, emoji in enumerate(emoji_list())}
    rng = np.random.default_rng(seed)
    return to_tensor(
        [
            paste(draw(background, rng), numbers[thing], small=False, rng=rng)
            for thing, background in zip(things, backgrounds, strict=True)
        ]
    )


def write_style(folder: Path, style: Callable[[Tensor], Tensor], seed: int) -> None:
    """Write the style's pictures and captions. The captions do not name the style: it is there at any prompt."""
    things = style_objects()[0][:STYLE_PICTURES]
    backgrounds = [SCENES[number % len(SCENES)] for number in range(len(things))]
    captions = [prompt(*pair) for pair in zip(things, backgrounds, strict=True)]
    _write(folder, style(draw_real(things, backgrounds, seed)), captions)


def write_subject(folder: Path, seed: int) -> None:
    """Write the subject's pictures and captions."""
    backgrounds = SCENES[:SUBJECT_PICTURES]
    pictures = draw_real([SUBJECT] * len(backgrounds), backgrounds, seed)
    _write(folder, pictures, [subject_prompt(background) for background in backgrounds])


def _write(folder: Path, pictures: Tensor, captions: Sequence[str]) -> None:
    """Write `01.png`, `01.txt`, ..."""
    arrays = ((pictures + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    for number, (array, caption) in enumerate(zip(arrays, captions, strict=True), 1):
        with replacing(folder / f"{number:02}.png") as temporary:
            Image.fromarray(array).save(temporary, format="PNG")
        write_text(folder / f"{number:02}.txt", caption + "\n")
