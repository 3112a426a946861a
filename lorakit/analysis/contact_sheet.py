"""Draw pictures as training will see them: a contact sheet with each crop as a frame and the caption beneath.

What lies outside a crop is darkened; what a mask leaves out is tinted red. With random crops the frames of the first
three epochs are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.pictures.item import Box, PictureItem
from .labels import wrapped

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

COLUMNS, ROWS = 4, 5  # of a page
CELL = 260  # pixels: the square in which a picture is drawn
GAP = 20
TEXT, LINE = 13, 17  # font size, distance of lines
CAPTION_LINES = 3
BELOW = LINE * (2 + CAPTION_LINES) + 6
PAPER, INK, MUTED, FRAME = (250, 250, 248), (28, 28, 30), (110, 112, 118), (0, 200, 83)
MUCH = (200, 60, 20)
SHADOW = 0.35  # brightness outside the crop
DRAWN_EPOCHS = 3


def sheets(items: Sequence[PictureItem], title: str, much: float) -> Iterator[Image]:
    """Yield the pages. `much`: the share cropped away from which on it is written in red."""
    each = COLUMNS * ROWS
    pages = -(-len(items) // each)
    for page in range(pages):
        number = f", page {page + 1} of {pages}" if pages > 1 else ""
        yield _page(items[page * each : (page + 1) * each], f"{title}{number}", much)


def page_paths(out: Path, count: int) -> list[Path]:
    """Return the files of the pages: OUT itself for one page, else OUT-1, OUT-2, ... before its suffix."""
    pages = -(-count // (COLUMNS * ROWS))
    if pages == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{page + 1}{out.suffix}") for page in range(pages)]


def _page(items: Sequence[PictureItem], title: str, much: float) -> Image:
    from PIL import Image, ImageDraw

    across = min(COLUMNS, len(items))
    down = -(-len(items) // across)
    head = GAP + LINE + 8
    page = Image.new("RGB", (GAP + across * (CELL + GAP), head + down * (CELL + BELOW + GAP)), PAPER)
    draw = ImageDraw.Draw(page)
    wrapped(title, page.width - 2 * GAP, TEXT + 2, most_lines=1).draw(draw, GAP, GAP - 4, INK)
    for number, item in enumerate(items):
        left = GAP + number % across * (CELL + GAP)
        top = head + number // across * (CELL + BELOW + GAP)
        _draw(page, item, left, top)
        _label(draw, item, left, top + CELL + 4, much)
    return page


def _draw(page: Image, item: PictureItem, x: int, y: int) -> None:
    """Draw a picture into its cell: the crop bright, the rest dark, frames around what is kept."""
    from PIL import ImageDraw, ImageEnhance
    from PIL.Image import Resampling

    image = _tinted(item)
    scale = CELL / max(image.size)
    # Pixel art stays pixel art.
    how = Resampling.NEAREST if scale >= 2 else Resampling.LANCZOS
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    bright = image.resize(size, how)
    boxes = [
        (round(left * scale), round(top * scale), round(right * scale), round(bottom * scale))
        for left, top, right, bottom in _boxes(item)
    ]
    dark = ImageEnhance.Brightness(bright).enhance(SHADOW)
    for box in boxes:
        dark.paste(bright.crop(box), (box[0], box[1]))
    if item.cropped > 0:
        frame = ImageDraw.Draw(dark)
        for x0, y0, x1, y1 in boxes:
            frame.rectangle((x0, y0, x1 - 1, y1 - 1), outline=FRAME, width=2 if len(boxes) == 1 else 1)
    page.paste(dark, (x + (CELL - size[0]) // 2, y + CELL - size[1]))  # next to its text


def _boxes(item: PictureItem) -> list[Box]:
    if item.chances.crop != "random":
        return [item.plain.box]
    return list(dict.fromkeys(item.drawn(0, epoch).box for epoch in range(DRAWN_EPOCHS)))


def _tinted(item: PictureItem) -> Image:
    from PIL import Image, ImageChops

    image = item.decoded().rgb
    mask = item.full_mask()
    if mask is None:
        return image
    red = Image.blend(image, Image.new("RGB", image.size, (220, 40, 40)), 0.6)
    return Image.composite(red, image, ImageChops.invert(mask))


def _label(draw: ImageDraw, item: PictureItem, left: int, top: int, much: float) -> None:
    (w, h), (bucket_w, bucket_h) = item.original, item.group
    name = Path(item.where).name + (" (prior)" if item.is_prior else "")
    if item.chances.crop == "stretch":
        cut = "stretched" if w * bucket_h != h * bucket_w else ""
    else:
        cut = f"{item.cropped:.0%} cropped" if item.cropped >= 0.005 else ""
    size = f"{w}x{h} to {bucket_w}x{bucket_h}" if (w, h) != (bucket_w, bucket_h) else f"{w}x{h}"
    wrapped(name, CELL, TEXT, most_lines=1).draw(draw, left, top, INK)
    size_line = wrapped(f"{size}{', ' * bool(cut)}{cut}", CELL, TEXT, most_lines=1)
    size_line.draw(draw, left, top + LINE, MUCH if item.cropped > much else MUTED)
    caption = wrapped(item.caption or "(no caption)", CELL, TEXT, most_lines=CAPTION_LINES)
    caption.draw(draw, left, top + 2 * LINE + 3, INK)
