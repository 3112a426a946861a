"""Draw the pictures of docs/example-pictures: a fox of Twemoji in seven drawn places, of five shapes and three types.

    python scripts/make_example_pictures.py --out docs/example-pictures

`lorakit data show docs/example-pictures --resolution 128 --out sheet.png` shows what a training makes of them: buckets,
crops, a photo that EXIF turns, a transparent picture, and one that loses a fifth to the crop.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

ASSETS = Path(__file__).parents[1] / "lorakit" / "assets" / "twemoji"
SIDE = 32  # of an emoji on the sheet
COLUMNS = 12

SKIES = {  # colours at the top, at the horizon, and of the ground
    "meadow": ((120, 190, 245), (225, 242, 252), (104, 168, 72)),
    "snow": ((150, 175, 210), (222, 230, 240), (244, 247, 250)),
    "desert": ((246, 196, 120), (252, 232, 190), (222, 178, 112)),
    "night": ((12, 16, 44), (48, 52, 104), (24, 40, 40)),
    "sunset": ((92, 60, 130), (250, 150, 90), (70, 48, 60)),
    "sea": ((130, 200, 240), (235, 246, 252), (48, 120, 176)),
}
# name, caption, size, place, emoji with (center x, bottom y, side) in shares of the picture's height
PICTURES = (
    ("meadow.png", "a sks fox in a meadow, a mushroom beside it", (192, 128), "meadow",
     (("fox", 0.55, 0.92, 0.62), ("mushroom", 1.2, 0.9, 0.28))),
    ("snow.jpg", "a sks fox in the snow, a tree behind it", (128, 192), "snow",
     (("tree", 0.5, 0.6, 0.32), ("fox", 0.3, 0.9, 0.4))),
    ("desert.jpg", "a sks fox in the desert, two cacti", (400, 80), "desert",
     (("cactus", 0.3, 0.9, 0.6), ("fox", 3.1, 0.95, 0.75), ("cactus", 4.6, 0.9, 0.45))),
    ("night.png", "a sks fox at night", (128, 128), "night", (("fox", 0.5, 0.9, 0.6),)),
    ("sunset.webp", "a sks fox at sunset, a palm tree, seen from afar", (172, 128), "sunset",
     (("palm", 1.05, 0.85, 0.6), ("fox", 0.5, 0.95, 0.4))),
    ("sea.jpg", "a sks fox by the sea, a boat", (128, 192), "sea",
     (("boat", 0.5, 0.6, 0.18), ("fox", 0.22, 0.92, 0.34))),
    ("cutout.png", "a sks fox", (128, 128), None, (("fox", 0.5, 0.95, 0.9),)),
)  # fmt: skip


def emoji(word: str, side: int) -> Image.Image:
    words = [entry["word"] for entry in json.loads((ASSETS / "emoji.json").read_text(encoding="utf8"))]
    row, column = divmod(words.index(word), COLUMNS)
    with Image.open(ASSETS / "emoji.png") as file:
        sheet = file.convert("RGBA")
    box = (column * SIDE, row * SIDE, (column + 1) * SIDE, (row + 1) * SIDE)
    return sheet.crop(box).resize((side, side), Image.Resampling.LANCZOS)


def scene(size: tuple[int, int], place: str | None) -> Image.Image:
    """A sky that brightens towards the horizon, and a ground; transparent without a place."""
    width, height = size
    if place is None:
        return Image.new("RGBA", size, (0, 0, 0, 0))
    top, low, ground = (np.array(colour, np.float64) for colour in SKIES[place])
    horizon = round(0.6 * height)
    share = np.linspace(0, 1, horizon)[:, None]
    rows = np.concatenate([top + (low - top) * share, np.tile(ground, (height - horizon, 1))])
    pixels = np.repeat(rows[:, None], width, 1).round().astype(np.uint8)
    return Image.fromarray(pixels).convert("RGBA")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, caption, size, place, things in PICTURES:
        image = scene(size, place)
        height = size[1]
        for word, x, bottom, share in things:
            sprite = emoji(word, round(share * height))
            at = (round(x * height - sprite.width / 2), round(bottom * height - sprite.height))
            image.alpha_composite(sprite, (max(0, at[0]), max(0, at[1])))
        path = out / name
        exif = Image.Exif()
        if name == "snow.jpg":  # as a phone that was held upright stores it: lying, with the turn in EXIF
            image = image.transpose(Image.Transpose.ROTATE_90)
            exif[0x0112] = 6
        options = {".jpg": {"quality": 90}, ".webp": {"quality": 90}}.get(path.suffix, {"optimize": True})
        (image if place is None else image.convert("RGB")).save(path, exif=exif, **options)
        path.with_suffix(".txt").write_text(caption + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
