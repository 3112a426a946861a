"""What a source of pictures gives: each picture's bytes and caption, and what else was seen there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

CAPTION_COLUMNS = ("text", "caption", "prompt")


@dataclass(frozen=True)
class Found:
    """One picture. `where`: its file, or file and row; `folder`: below the source, "" for the source itself;

    `name`: its path below the source without suffix, which its mask has too; `path`: its file, None for a row's bytes.
    """

    where: str
    folder: str
    name: str
    read: Callable[[], bytes]
    caption: str | None
    path: Path | None = None


@dataclass(frozen=True)
class Source:
    """The pictures of a source, in a fixed order, and notes: message -> how many files or rows it concerns."""

    name: str
    pictures: list[Found]
    notes: dict[str, int] = field(default_factory=dict)
    expected: str = "a caption"  # what a picture without a caption lacks, for the error
