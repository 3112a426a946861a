"""Masks: where the loss counts. Files of a folder with the pictures' names, or the pictures' own opacity."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ...errors import DataError, listing
from .check import Checked
from .decode import decode
from .folder import pictures_below
from .item import Mask

ALPHA = "alpha"
# A mask of another size is resized; of another shape it belongs to another picture or to an uncropped one.
ASPECT_TOLERANCE = 0.02


def read_masks(source: str, checked: Sequence[Checked], notes: dict[str, int]) -> list[Mask | None]:
    """Return each picture's mask, and add notes. Raises DataError, naming the pictures, where there is none."""
    if source == ALPHA:
        opaque = sum(not one.has_alpha for one in checked)
        if opaque == len(checked):
            raise DataError("mask: alpha: no picture has transparent parts\n  give a folder of masks, or remove mask")
        if opaque:
            notes["opaque everywhere, so that all of the picture counts (mask: alpha)"] = opaque
        return [Mask(content=ALPHA) if one.has_alpha else None for one in checked]
    return _of_folder(Path(source).expanduser(), checked, notes)


def _of_folder(folder: Path, checked: Sequence[Checked], notes: dict[str, int]) -> list[Mask | None]:
    if not folder.is_dir():
        raise DataError(f"mask: there is no folder {folder}\n  expected 'alpha', or a folder of masks")
    files = {str(path.relative_to(folder).with_suffix("")): path for path in pictures_below(folder)}
    missing = [one.where for one in checked if one.found.name not in files]
    if missing:
        raise DataError(
            f"{folder}: no mask for {len(missing)} of {len(checked)} pictures: {listing(missing)}\n"
            "  expected a picture of the same name (any type), in the same folder below this one"
        )
    used = {one.found.name for one in checked}
    unused = [name for name in files if name not in used]
    if unused:
        notes[f"masks without a picture, not used: {listing(unused)}"] = len(unused)
    masks: list[Mask | None] = []
    for one in checked:
        (width, height), path = one.size, files[one.found.name]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        w, h = decode(data, str(path), animated="first").rgb.size
        if abs(w * height / (h * width) - 1) > ASPECT_TOLERANCE:
            raise DataError(f"{path}: {w}x{h}, but its picture {one.where} is {width}x{height}; expected one shape")
        masks.append(Mask(str(path), hashlib.sha256(data).hexdigest(), path.read_bytes))
    return masks
