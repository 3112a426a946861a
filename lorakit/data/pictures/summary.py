"""What to say about a set of pictures: in the start panel, as notes, and in the result's metadata."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import listing
from .buckets import CROPPED_MUCH, Grid
from .item import PictureItem

SHOWN_CAPTIONS = 3
STORED_TAGS = 1000


@dataclass(frozen=True)
class Folder:
    """A folder's counts. `captions`: pictures with one of their own; `repeats`: how often an epoch has each."""

    name: str
    pictures: int
    captions: int
    repeats: int
    is_prior: bool = False


def shape(items: Sequence[PictureItem], folders: Sequence[Folder]) -> str:
    """Describe how many pictures and captions each folder has, and give the first captions."""
    counts = [f"{_count(f.pictures, 'picture')}, {_count(f.captions, 'caption')}" for f in folders]
    if len(folders) > 1:
        counts = [f"{folder.name}: {count}" for folder, count in zip(folders, counts, strict=True)]
    captions = list(dict.fromkeys(item.caption for item in items if not item.is_prior and not item.repeat))
    shown = " · ".join(f"'{caption}'" for caption in captions[:SHOWN_CAPTIONS])
    return f"{listing(counts)}; captions: {shown}{' ...' * (len(captions) > SHOWN_CAPTIONS)}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def length(items: Sequence[PictureItem], grid: Grid) -> str:
    """Describe the buckets: how many pictures each has, and which share of them is cropped away."""
    pictures = [item for item in items if not item.repeat]
    counts = Counter(item.group for item in pictures)
    parts = []
    for bucket, count in counts.most_common():
        cut = sum(item.cropped for item in pictures if item.group == bucket) / count
        parts.append(f"{bucket[0]}x{bucket[1]}: {count:,}" + (f" ({cut:.1%} cropped)" if cut >= 0.0005 else ""))
    return f"resolution {grid.resolution}; {len(counts)} bucket{'s' * (len(counts) > 1)}, {listing(parts, 6)}"


def about(items: Sequence[PictureItem], trigger: str | None) -> dict[str, Any]:
    """Return what the result's metadata says of the data: counts, trigger word, how often captions have each part."""
    own = [item for item in items if not item.is_prior]
    tags = Counter(tag.strip() for item in own if not item.repeat for tag in item.caption.split(",") if tag.strip())
    return {
        "pictures": sum(not item.repeat for item in own),
        "items": len(own),
        "prior": sum(item.is_prior and not item.repeat for item in items),
        "trigger": trigger,
        "tags": dict(tags.most_common(STORED_TAGS)),
        "buckets": {f"{w}x{h}": count for (w, h), count in Counter(item.group for item in own).items()},
    }


def notes_on(items: Sequence[PictureItem], grid: Grid) -> dict[str, int]:
    """Return notes on pictures that repeat another one, lose much to the crop, or are small. `items`: of one source."""
    pictures = [item for item in items if not item.repeat]
    notes: dict[str, int] = {}
    first: dict[str, PictureItem] = {}
    same = [item for item in pictures if first.setdefault(item.content, item) is not item]
    if same:
        names = listing(f"{Path(item.where).name} = {Path(first[item.content].where).name}" for item in same)
        notes[f"the same file as an earlier one: {names}"] = len(same)
    much = sorted((item for item in pictures if item.cropped > CROPPED_MUCH), key=lambda item: -item.cropped)
    if much:
        names = listing(f"{Path(item.where).name} ({item.cropped:.0%})" for item in much)
        notes[f"more than {CROPPED_MUCH:.0%} is cropped away: {names} (data show --out draws the crops)"] = len(much)
    full = set(grid.sizes())
    small = [item for item in pictures if item.group not in full]
    if small:
        names = listing(f"{Path(item.where).name} ({item.group[0]}x{item.group[1]})" for item in small)
        note = f"smaller than resolution {grid.resolution}, trained at their own size: {names}"
        notes[f"{note} (--upscale: enlarge them)"] = len(small)
    if pictures[0].chances.shuffle_tags and not any("," in item.caption for item in pictures):
        notes["shuffle_tags has no effect: no caption has a comma"] = len(pictures)
    return notes
