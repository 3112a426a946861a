"""Print pictures as training will see them: counts by folder, buckets, the first captions, and all notes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .item import PictureItem
from .read import PictureData


def show(data: PictureData, rows: int = 3, console: Console | None = None) -> None:
    """Print the facts of `report`, with the first `rows` captions."""
    console = console or Console()
    folders = [
        [f.name, f"{f.pictures:,}", f"{f.captions:,}", f"{f.repeats:,}", "prior" if f.is_prior else ""]
        for f in data.folders
    ]
    heads = ["folder", "pictures", "captions", "times an epoch", ""]
    _print(console, "pictures", columns(heads if any(row[4] for row in folders) else heads[:4], folders))
    _print(console, f"buckets, resolution {data.grid.resolution}", bucket_lines(data))
    first = [item for item in data.pictures if not item.is_prior][:rows]
    if first:
        _print(
            console, "captions", columns(None, [[Path(item.where).name, item.caption or "(empty)"] for item in first])
        )
    if data.notes:
        console.print(Text("\nnotes", style="bold"))
        for note, count in data.notes.items():
            _note(console, f"{count:,}", note)


def report(data: PictureData) -> dict[str, Any]:
    """Return what `show` prints as a dict for scripts. Sizes are in pixels."""
    return {
        "pictures": len(data.pictures),
        "items": len(data.items),
        "resolution": data.grid.resolution,
        "folders": [
            {
                "folder": f.name,
                "pictures": f.pictures,
                "captions": f.captions,
                "repeats": f.repeats,
                "prior": f.is_prior,
            }
            for f in data.folders
        ],
        "buckets": [
            {
                "width": width,
                "height": height,
                "pictures": len(items),
                "cropped_mean": sum(item.cropped for item in items) / len(items),
                "cropped_most": max(item.cropped for item in items),
            }
            for (width, height), items in by_bucket(data.pictures)
        ],
        "captions": [{"file": item.where, "caption": item.caption, "cropped": item.cropped} for item in data.pictures],
        "notes": data.notes,
    }


def by_bucket(items: Sequence[PictureItem]) -> list[tuple[tuple[int, int], list[PictureItem]]]:
    """Return the items of each bucket, from the widest aspect to the tallest."""
    found: dict[tuple[int, int], list[PictureItem]] = {}
    for item in items:
        found.setdefault(item.group, []).append(item)
    return sorted(found.items(), key=lambda entry: (-entry[0][0] / entry[0][1], entry[0]))


def bucket_lines(data: PictureData) -> list[str]:
    """Return the table of buckets as lines: size, pictures, and the share of them that is cropped away."""
    rows = [
        [
            f"{width}x{height}",
            f"{len(items):,}",
            f"{sum(item.cropped for item in items) / len(items):.1%}",
            f"{max(item.cropped for item in items):.1%}",
        ]
        for (width, height), items in by_bucket(data.pictures)
    ]
    return columns(["bucket", "pictures", "cropped", "at most"], rows)


def columns(heads: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> list[str]:
    """Align rows of text in columns, the first to the left; without heads the last one too."""
    lines = ([heads] if heads else []) + [row[: len(heads)] if heads else row for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    left = {0} if heads else {0, len(widths) - 1}
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _print(console: Console, title: str, lines: Sequence[str]) -> None:
    console.print(Text(f"\n{title}", style="bold"))
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _note(console: Console, count: str, note: str) -> None:
    if not console.is_terminal:
        console.print(Text(f"{count:>5}  {note}"), soft_wrap=True)
        return
    grid = Table.grid(padding=(0, 2, 0, 0))  # wrapped below its own text
    grid.add_column(width=5, justify="right")
    grid.add_row(Text(count), Text(note))
    console.print(grid)
