"""Decode every picture once before training, so that all broken ones are named at the start, with their count."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from ...errors import DataError, listing, not_the_file
from .buckets import Size
from .decode import decode
from .found import Found, Source
from .settings import Decoding

# Decoding releases Python's lock. More threads than this would only hold more decoded pictures in memory.
THREADS = 4
NAMED = 20  # broken pictures that an error lists


@dataclass(frozen=True)
class Checked:
    """A picture that can be used. `content`: SHA-256 of its file; `size`: upright; `notes`: what was converted."""

    found: Found
    content: str
    size: Size
    has_alpha: bool
    notes: tuple[str, ...]

    @property
    def where(self) -> str:
        return self.found.where


def check_pictures(
    source: Source,
    settings: Decoding,
    background: tuple[int, int, int],
    on_picture: Callable[[int, int], None] | None = None,
) -> tuple[list[Checked], dict[str, int]]:
    """Return the pictures that can be used, in order, and notes. `on_picture`: called with (checked, all).

    Raises DataError, naming them with their count, if some are broken and `settings.broken` is not "skip", or if all
    are.
    """
    good: list[Checked] = []
    errors: list[str] = []
    names: list[str] = []
    with ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(partial(_check, settings=settings, background=background), source.pictures)
        for done, (found, result) in enumerate(zip(source.pictures, results, strict=True), start=1):
            if isinstance(result, Checked):
                good.append(result)
            else:
                errors.append(result)
                names.append(found.where)
            if on_picture is not None:
                on_picture(done, len(source.pictures))
    if errors and (settings.broken == "refuse" or not good):
        lines = "".join(f"\n  {error}" for error in errors[:NAMED])
        more = f"\n  and {len(errors) - NAMED} more" if len(errors) > NAMED else ""
        count = f"{len(errors)} of {len(source.pictures)} pictures cannot be used"
        fix = "remove or replace them, or leave them out: --broken skip"
        raise DataError(f"{source.name}: {count}:{lines}{more}\n  {fix}")
    notes = dict(Counter(note for one in good for note in one.notes))
    if errors:
        notes[f"broken, left out: {listing(names)}"] = len(errors)
    return good, notes


def _check(found: Found, settings: Decoding, background: tuple[int, int, int]) -> Checked | str:
    """Decode one picture; return what is wrong with it if that fails."""
    try:
        data = found.read()
        decoded = decode(data, found.where, background, settings.animated)
    except OSError as error:
        return f"{found.where}: cannot be read: {error.strerror or error}"
    except DataError as error:
        stands_in = not_the_file(found.path) if found.path is not None else None
        return (stands_in or str(error)).replace("\n", "\n  ")
    return Checked(found, hashlib.sha256(data).hexdigest(), decoded.rgb.size, decoded.alpha is not None, decoded.notes)
