"""Captions: the trigger word, and what an epoch draws of a caption (dropout, shuffled tags)."""

from __future__ import annotations

import re
from random import Random

PLACEHOLDER = "[trigger]"


def with_trigger(caption: str, trigger: str | None) -> str:
    """Put the trigger word where the caption says [trigger], or before a caption that does not contain it."""
    if not trigger:
        return caption
    caption = caption.replace(PLACEHOLDER, trigger)
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def shuffled(caption: str, keep: int, trigger: str | None, random: Random) -> str:
    """Shuffle the parts between commas. The first `keep` parts stay, and so does a trigger word before them."""
    tags = [tag.strip() for tag in caption.split(",")]
    tags = [tag for tag in tags if tag]
    fixed = keep + (bool(tags) and trigger is not None and tags[0].lower() == trigger.lower())
    # Sorted by random keys rather than Random.shuffle, whose algorithm Python does not promise to keep.
    rest = sorted(tags[fixed:], key=lambda _: random.random())
    return ", ".join([*tags[:fixed], *rest])
