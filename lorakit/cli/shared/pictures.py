"""Print and draw a data set of pictures, for `lorakit data show`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...data.pictures.settings import PictureSettings
from ...errors import ConfigError
from .next import command
from .output import say
from .starting import starting


def show_pictures(
    data: str,
    model: str,
    split: str | None,
    columns: Mapping[str, str] | None,
    settings: PictureSettings,
    rows: int,
    out: Path | None,
    json_output: bool,
    flags: Mapping[str, Any],
) -> None:
    """Print counts, buckets, captions and notes; draw the contact sheet if `out` is given. `flags`: for `next:`."""
    if out is not None and out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out}: a contact sheet is written as a PNG file\n  give a name that ends in .png")
    if out is not None and out.expanduser().resolve().is_relative_to(Path(data).expanduser().resolve()):
        raise ConfigError(f"--out {out}: in {data} the sheet would be one of the pictures\n  write it somewhere else")
    resolution, multiple, why = _size_for(model, settings)
    with starting(f"looking at the pictures of {data}"):
        from ...analysis.fonts import missing
        from ...data.pictures.read import read_pictures
        from ...data.pictures.show import report, show

        read = read_pictures(data, settings, resolution=resolution, multiple=multiple, split=split, columns=columns)
        written = _draw(read, data, out) if out is not None else []
    if json_output:
        print(json.dumps(report(read) | {"sheets": [str(path) for path in written]}))
        return
    if why:
        say(why)
    show(read, rows)
    if written:
        say(f"\nwritten: {', '.join(str(path) for path in written)}")
        without_font = missing(item.caption for item in read.pictures)
        if without_font:
            say(without_font)
    options = {"split": split, "columns": columns} | dict(flags)
    shown = None if model == "embedded" else model
    print(f"\nnext: {command('image train', data, model=shown, **options)}")


def _draw(read: Any, data: str, out: Path) -> list[Path]:
    from ...analysis.contact_sheet import page_paths, sheets
    from ...data.pictures.buckets import CROPPED_MUCH
    from ...io.atomic import replacing

    pictures = read.pictures
    paths = page_paths(out.expanduser(), len(pictures))
    title = f"{data}: {len(pictures):,} pictures, resolution {read.grid.resolution}"
    for path, page in zip(paths, sheets(pictures, title, CROPPED_MUCH), strict=True):
        with replacing(path) as temporary:
            page.save(temporary, format="PNG")
    return paths


def _size_for(model: str, settings: PictureSettings) -> tuple[int, int, str]:
    """The model's own resolution and multiple, and a line that says so where the setting does not decide."""
    from ...bases.native_size import FALLBACK, MULTIPLE, native_size

    own = native_size(model)
    if own is None:
        why = f"resolution {FALLBACK}: {model} is not on this disk to say its own; --resolution changes it"
        own = FALLBACK, MULTIPLE
    else:
        why = f"resolution {own[0]}: the {model} model's own; --model or --resolution changes it"
    return own[0], math.lcm(own[1], MULTIPLE), why if settings.resolution == "auto" else ""
