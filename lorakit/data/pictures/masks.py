"""Masks: where the loss counts. Files of a folder with the pictures' names, or the pictures' own opacity."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ...errors import DataError, listing
from .buckets import Size
from .decode import decode
from .folder import pictures_below
from .found import Found
from .item import Mask

ALPHA = "alpha"
# A mask of another size is resized; of another shape it belongs to another picture or to an uncropped one.
ASPECT_TOLERANCE = 0.02


def read_masks(
    source: str, found: Sequence[Found], sizes: Sequence[Size], alphas: Sequence[bool], notes: dict[str, int]
) -> list[Mask | None]:
    """Return each picture's mask. `alphas`: whether it has transparent parts. Raises DataError, naming the pictures."""
    if source == ALPHA:
        opaque = sum(not alpha for alpha in alphas)
        if opaque == len(alphas):
            raise DataError("mask: alpha: no picture has transparent parts\n  give a folder of masks, or remove mask")
        if opaque:
            notes["opaque everywhere, so that all of the picture counts (mask: alpha)"] = opaque
        return [Mask(content=ALPHA) if alpha else None for alpha in alphas]
    return _of_folder(Path(source).expanduser(), found, sizes, notes)


def _of_folder(folder: Path, found: Sequence[Found], sizes: Sequence[Size], notes: dict[str, int]) -> list[Mask | None]:
    if not folder.is_dir():
        raise DataError(f"mask: there is no folder {folder}\n  expected 'alpha', or a folder of masks")
    files = {str(path.relative_to(folder).with_suffix("")): path for path in pictures_below(folder)}
    missing = [one.where for one in found if one.name not in files]
    if missing:
        raise DataError(
            f"{folder}: no mask for {len(missing)} of {len(found)} pictures: {listing(missing)}\n"
            "  expected a picture of the same name (any type), in the same folder below this one"
        )
    unused = [name for name in files if name not in {one.name for one in found}]
    if unused:
        notes[f"masks without a picture, not used: {listing(unused)}"] = len(unused)
    masks: list[Mask | None] = []
    for one, (width, height) in zip(found, sizes, strict=True):
        path = files[one.name]
        data = path.read_bytes()
        w, h = decode(data, str(path), animated="first").rgb.size
        if abs(w * height / (h * width) - 1) > ASPECT_TOLERANCE:
            raise DataError(f"{path}: {w}x{h}, but its picture {one.where} is {width}x{height}; expected one shape")
        masks.append(Mask(str(path), hashlib.sha256(data).hexdigest(), path.read_bytes))
    return masks
