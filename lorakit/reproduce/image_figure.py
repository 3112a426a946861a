"""The image demo's picture: adapters by prompts, the same seeds in every row."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..io.atomic import replacing
from .emoji.captions import BACKGROUNDS, noun_phrase, prompt
from .image_data import SUBJECT, subject_prompt
from .image_measures import STACK, Studio, Weights

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = (
    ("strawberry", "meadow"),
    ("panda", "red"),
    ("pumpkin", "sea"),
    ("butterfly", "desert"),
    ("penguin", "snow"),
    ("pizza", "green"),
)  # objects that the style's pictures do not show
ROWS: tuple[tuple[str, Weights, bool], ...] = (
    ("base", None, False),
    ("style 0.5", {"style": 0.5}, False),
    ("style 1", {"style": 1.0}, False),
    ("slider -2", {"slider": -2.0}, False),
    ("slider 2", {"slider": 2.0}, False),
    (f'base: "{subject_prompt()} …"', None, True),
    (f'subject (a {SUBJECT}): "{subject_prompt()} …"', {"subject": 1.0}, True),
    (f"subject {STACK['subject']:g} + style {STACK['style']:g}", STACK, True),
)  # label, weights, and whether the prompt has the subject instead of the column's object


def draw_figure(studio: Studio, seed: int, path: Path) -> Path:
    """Draw the picture and write it as PNG."""
    from ..generate.pictures.grid import grid

    pictures: list[list[Image]] = []
    for _, weights, of_subject in ROWS:
        prompts = [subject_prompt(scene) if of_subject else prompt(thing, scene) for thing, scene in COLUMNS]
        pictures.append(studio.draw(prompts, weights, seed + 1000))
    figure = grid(
        pictures,
        rows=[label for label, _, _ in ROWS],
        columns=[f"{noun_phrase(thing)} {BACKGROUNDS[scene]}" for thing, scene in COLUMNS],
        title="LoRAs of the embedded pipeline (32 x 32 pixels), trained by lorakit demo --image",
        note=f"the same seed in each column, from {seed + 1000} on",
    )
    with replacing(path) as temporary:
        figure.save(temporary, format="PNG", optimize=True)
    return path
