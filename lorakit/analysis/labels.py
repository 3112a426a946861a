"""Text on a picture: wrapped, in matplotlib's DejaVu Sans and, for characters it lacks, an installed font."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from PIL import ImageDraw, ImageFont

from .fonts import font_files

LINE_HEIGHT = 1.3  # of the font's size
MOST_LINES = 8  # a longer label ends in "…"
Colour = str | tuple[int, int, int]


@dataclass(frozen=True)
class Label:
    """Wrapped text. `width`, `height`: in pixels; `size`: the font's, in pixels."""

    lines: tuple[str, ...]
    size: int
    bold: bool = False

    @property
    def width(self) -> int:
        return max((text_width(line, self.size, self.bold) for line in self.lines), default=0)

    @property
    def height(self) -> int:
        return round(len(self.lines) * self.size * LINE_HEIGHT)

    def draw(self, canvas: ImageDraw.ImageDraw, x: float, y: float, fill: Colour, align: float = 0.0) -> None:
        """Draw with the upper edge at `y`; the lines start at `x` (`align` 0), are centred on it (0.5) or end there
        (1).
        """
        for n, line in enumerate(self.lines):
            at = x - align * text_width(line, self.size, self.bold)
            baseline = y + (n * LINE_HEIGHT + 1) * self.size
            for run, font in _runs(line, self.size, self.bold):
                canvas.text((at, baseline), run, fill=fill, font=font, anchor="ls")
                at += font.getlength(run)


def wrapped(text: str, width: float, size: int, bold: bool = False, most_lines: int = MOST_LINES) -> Label:
    """Wrap a text between words, and inside words that are wider than `width` pixels. Newlines are kept."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            if len(lines) > most_lines:
                break
            longer = f"{line} {word}" if line else word
            if text_width(longer, size, bold) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            line = word
            while text_width(line, size, bold) > width and len(line) > 1 and len(lines) <= most_lines:
                fits = _fitting(line, width, size, bold)
                lines.append(line[:fits])
                line = line[fits:]
        lines.append(line)
    if len(lines) > most_lines:
        last = lines[most_lines - 1]
        while last and text_width(f"{last}…", size, bold) > width:
            last = last[:-1]
        lines = [*lines[: most_lines - 1], f"{last.rstrip()}…"]
    return Label(tuple(lines) if text.strip() else (), size, bold)


def text_width(text: str, size: int, bold: bool = False) -> int:
    """Return a line's width in pixels."""
    return round(sum(font.getlength(run) for run, font in _runs(text, size, bold)))


def _fitting(word: str, width: float, size: int, bold: bool) -> int:
    """Return how many characters of a word fit into `width`, at least one."""
    counts = range(1, len(word) + 1)
    return max(1, bisect_right(counts, width, key=lambda count: text_width(word[:count], size, bold)))


def _runs(text: str, size: int, bold: bool) -> list[tuple[str, ImageFont.FreeTypeFont]]:
    """Split a line into runs of one font each."""
    return [("".join(run), _font(_styled(file, bold), size)) for file, run in groupby(text, _file_of)]


@lru_cache(maxsize=8192)
def _file_of(character: str) -> str:
    """Return a font that has the character, DejaVu Sans if none does."""
    return font_files(character)[-1]


def _styled(file: str, bold: bool) -> str:
    """Return the bold font beside a regular one, if there is one."""
    heavy = Path(file).with_name(f"{Path(file).stem}-Bold{Path(file).suffix}")
    return str(heavy) if bold and heavy.exists() else file


@lru_cache(maxsize=64)
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)
