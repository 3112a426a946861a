"""Captions: "a small panda in a meadow", "an animal on a red background", "a rocket".

A scene is an object on a background. One pair in eleven is held out: no picture of it is ever trained on, so that a
prompt can ask for a combination that the model has not seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TWEMOJI = Path(__file__).parents[2] / "assets" / "twemoji"

PLAIN = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "gray", "white", "black")
BACKGROUNDS = {
    **{colour: f"on a {colour} background" for colour in PLAIN},
    "meadow": "in a meadow",
    "sea": "at sea",
    "desert": "in the desert",
    "snow": "in the snow",
    "night": "at night",
    "sunset": "at sunset",
}  # each background and the words for it
BACKGROUNDS["orange"] = "on an orange background"

SMALL_SHARE = 0.3  # of the pictures; with 0.2 small objects stayed weak (they cover few latents)
LARGE_SHARE = 0.3  # of the captions of the other pictures say "large"
KIND_SHARE = 0.12  # captions with the kind instead of the object: "an animal"
NO_BACKGROUND_SHARE = 0.08  # captions that leave the background open
EMPTY_SHARE = 0.1  # for classifier-free guidance


@dataclass(frozen=True)
class Emoji:
    word: str
    kind: str
    name: str
    seen: bool


def emoji_list() -> list[Emoji]:
    """All emoji of the sheet; those the base model is trained on come first."""
    return [Emoji(**entry) for entry in json.loads((TWEMOJI / "emoji.json").read_text(encoding="utf8"))]


OBJECTS = [emoji for emoji in emoji_list() if emoji.seen]


def held_out(thing: int, background: int) -> bool:
    """Whether the pair of the n-th object and the n-th background is never trained on."""
    return (5 * thing + 3 * background) % 11 == 4


def pairs(held: bool) -> list[tuple[int, int]]:
    """(object, background) of all pairs that are held out, or of all that are not."""
    grid = np.ndindex(len(OBJECTS), len(BACKGROUNDS))
    return [(thing, background) for thing, background in grid if held_out(thing, background) == held]


def noun_phrase(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def prompt(thing: str, background: str | None = None, size: str = "") -> str:
    """`prompt("panda", "meadow", "small")` is "a small panda in a meadow"."""
    phrase = noun_phrase(f"{size} {thing}".strip())
    return f"{phrase} {BACKGROUNDS[background]}" if background else phrase


def random_caption(rng: np.random.Generator, thing: Emoji, background: str, small: bool) -> str:
    """A caption of the picture as a training step has it: sometimes less is said than there is to see."""
    if rng.random() < EMPTY_SHARE:
        return ""
    size = "small" if small else "large" if rng.random() < LARGE_SHARE else ""
    word = thing.kind if rng.random() < KIND_SHARE else thing.word
    return prompt(word, None if rng.random() < NO_BACKGROUND_SHARE else background, size)


def all_words() -> Iterator[str]:
    """Every word that captions are made of."""
    phrases = ["a an small large", *BACKGROUNDS.values(), *(f"{e.word} {e.kind}" for e in OBJECTS)]
    return iter(sorted({word for phrase in phrases for word in phrase.split()}))
