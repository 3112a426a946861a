"""Find fonts for a plot's labels: matplotlib's own, and an installed one for characters it lacks, such as 注意力."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

MISSING = "□: no installed font has these characters; one that does: fonts-noto-cjk"


@contextmanager
def fonts_for(texts: Iterable[str]) -> Iterator[str | None]:
    """Within the block, matplotlib draws `texts` with fonts that have their characters.

    Yields None, or what to write into the figure if no installed font has some of them.
    """
    import warnings

    import matplotlib

    families, complete = _families(_points(texts))
    with matplotlib.rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the figure says so
        yield None if complete else MISSING


@lru_cache(maxsize=1024)
def font_files(text: str) -> tuple[str, ...]:
    """Return the files of fonts that together have the text's characters as far as installed ones do; the first is
    DejaVu Sans.
    """
    from matplotlib import font_manager

    return tuple(map(font_manager.findfont, _families(_points([text]))[0]))


def missing(texts: Iterable[str]) -> str | None:
    """Return what to say of characters that no installed font has, None if there are none."""
    return None if _families(_points(texts))[1] else MISSING


def _points(texts: Iterable[str]) -> set[int]:
    return {ord(c) for text in texts for c in text if not c.isspace()}


def _families(characters: set[int]) -> tuple[list[str], bool]:
    """Return font families that together have the characters, and whether they have all of them."""
    from matplotlib import font_manager

    manager: Any = font_manager.fontManager
    families = ["DejaVu Sans"]  # matplotlib's own, always there
    left = characters - _characters(font_manager.findfont(families[0]))
    if not left:
        return families, True
    known = {entry.fname for entry in manager.ttflist}
    for path in font_manager.findSystemFonts():  # matplotlib's list may be older than an installed font
        if path not in known and "CJK" in path:
            manager.addfont(path)
    # Sans serif fonts for Chinese, Japanese and Korean first: a machine may have hundreds of others.
    entries = sorted(
        manager.ttflist, key=lambda e: ("CJK" not in e.name, "Sans" not in e.name, e.weight != 400, e.name)
    )
    tried: set[str] = set()
    for family, path in ((entry.name, entry.fname) for entry in entries):
        if family in tried or "Last Resort" in family:  # that one has a placeholder for every character
            continue
        tried.add(family)
        found = left & _characters(path)
        if found:
            families.append(family)
            left -= found
        if not left:
            break
    return families, not left


def _characters(path: str) -> set[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return set(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):  # a bitmap font, or a file that has gone
        return set()
