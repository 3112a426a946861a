"""Draw pictures as one labelled grid.

                 title
                 column    column
    row          picture   picture
    row          picture   picture
                 note

Pictures keep their pixels: small ones are enlarged by a whole number with nearest neighbour, so that each pixel becomes
a square; only those above `LARGEST` are reduced, since the grid is to be looked at and the pictures are saved by
themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw

from ...analysis.labels import Label, wrapped
from ...errors import ConfigError

SMALLEST, LARGEST = 160, 768  # a cell's longer side in pixels: 32-pixel pictures are drawn at 160
PAPER, INK, FAINT, EDGE = "#ffffff", "#1c1c1e", "#6e6e73", "#d9d9de"


def grid(
    pictures: Sequence[Sequence[Image.Image | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str | None = None,
    note: str | None = None,
) -> Image.Image:
    """Return the pictures as one, with the rows' names at the left, the columns' names above, and a title.

    `pictures`: a list for each row; None leaves a cell empty. `note`: a line below in grey, such as the seed. Labels
    are wrapped to their cell; all empty ones of a side take no room. Pictures may differ in size.

    Raises ConfigError if there are no pictures, or not one for each row and column.
    """
    cells = [[None if picture is None else _shown(picture) for picture in row] for row in pictures]
    _check(cells, rows, columns)
    widths = [_most(cell.width for row in cells if (cell := row[n])) for n in range(len(columns))]
    heights = [_most(cell.height for cell in row if cell) for row in cells]
    size = min(26, max(14, round(min(widths) / 12)))  # the labels' font, in pixels
    gap = max(6, size // 2)
    margin = 2 * gap

    above = [wrapped(name, width, size) for name, width in zip(columns, widths)]
    beside = [wrapped(name, max(1.2 * min(widths), 8 * size), size) for name in rows]
    left = margin + (max(label.width for label in beside) + 2 * gap if any(label.lines for label in beside) else 0)
    inner = sum(widths) + gap * (len(widths) - 1)  # the width of the cells
    heading = wrapped(title or "", left - margin + inner, round(1.35 * size), bold=True)
    remark = wrapped(note or "", left - margin + inner, round(0.9 * size))
    top = margin + _room(heading, after=2 * gap) + _room(*above, after=gap)

    width = left + inner + margin
    height = top + sum(heights) + gap * (len(heights) - 1) + (2 * gap + remark.height if remark.lines else 0) + margin
    image = Image.new("RGB", (width, height), PAPER)
    canvas = ImageDraw.Draw(image)
    heading.draw(canvas, margin, margin, INK)
    x = left
    for label, cell_width in zip(above, widths):
        label.draw(canvas, x + cell_width / 2, top - gap - label.height, INK, align=0.5)
        x += cell_width + gap
    y = top
    for label, row, cell_height in zip(beside, cells, heights):
        label.draw(canvas, left - 2 * gap, y + (cell_height - label.height) / 2, INK, align=1.0)
        x = left
        for cell, cell_width in zip(row, widths):
            if cell is not None:
                at = x + (cell_width - cell.width) // 2, y + (cell_height - cell.height) // 2
                # A hairline around it: a picture may be as white as the paper.
                canvas.rectangle((at[0] - 1, at[1] - 1, at[0] + cell.width, at[1] + cell.height), outline=EDGE)
                image.paste(cell, at)
            x += cell_width + gap
        y += cell_height + gap
    remark.draw(canvas, margin, y + gap, FAINT)
    return image


def _shown(picture: Image.Image) -> Image.Image:
    """Return a picture as it is drawn: enlarged by a whole number, as it is, or reduced."""
    picture = picture.convert("RGB")
    side = max(picture.size)
    if side > LARGEST:
        width, height = (max(1, round(length * LARGEST / side)) for length in picture.size)
        return picture.resize((width, height), Image.Resampling.LANCZOS)
    factor = max(1, SMALLEST // side)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _check(cells: Sequence[Sequence[Image.Image | None]], rows: Sequence[str], columns: Sequence[str]) -> None:
    if not any(cell for row in cells for cell in row):
        raise ConfigError("grid(pictures, rows, columns): there are no pictures\n  expected a list of pictures a row")
    if len(cells) != len(rows) or any(len(row) != len(columns) for row in cells):
        sizes = ", ".join(str(len(row)) for row in cells)
        raise ConfigError(
            f"grid(pictures, rows, columns): {len(cells)} rows of {sizes} pictures, but {len(rows)} names of rows and "
            f"{len(columns)} of columns\n  expected a picture, or None, for each row and column"
        )


def _most(lengths: Iterable[int]) -> int:
    """Return the largest length; of a row or column without pictures, the smallest cell's."""
    return max(lengths, default=SMALLEST // 2)


def _room(*labels: Label, after: int) -> int:
    """Return the height of labels side by side and of the gap below them; 0 if all are empty."""
    height = max(label.height for label in labels)
    return height + after if height else 0
