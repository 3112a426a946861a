"""One picture with a label as training sees it: what each epoch draws of it, and its pixels.

item.drawn(seed, epoch)  ->  the item with a crop and a flip    a function of its arguments alone: resuming is exact
item.image()             ->  the picture in RGB, cropped and mirrored

The image processor of the base makes the pixels: sizes, mean and deviation are the base's, never ours.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, Literal

from ...errors import DataError
from ..parse import Row
from .buckets import Size
from .decode import decode
from .item import Box

if TYPE_CHECKING:
    from PIL.Image import Image

# The aspects of random crops, relative to the picture's, as torchvision's RandomResizedCrop has them.
LEAST_ASPECT, MOST_ASPECT = 3 / 4, 4 / 3


@dataclass(frozen=True)
class Augmenting:
    """What is drawn anew in each epoch. `flip`: mirror half of the pictures; `random_crop`: the least share of the area
    that a crop keeps, 1 for no crops.
    """

    flip: bool = False
    random_crop: float = 1.0


@dataclass(frozen=True)
class LabelledPicture:
    """`label`: its number, None for a picture to predict; `original`: the upright picture's size; `content`: SHA-256 of
    its file; `group`: the shape that the image processor makes of it, [channels, height, width]; `row`: that names it,
    None for a file in a folder.

    `box`, `mirrored`: what an epoch drew; without these it is as evaluation sees it.
    """

    where: str
    label: int | None
    original: Size
    content: str
    group: tuple[int, ...]
    read: Callable[[], bytes] = field(repr=False, compare=False)
    augmenting: Augmenting = Augmenting()
    background: tuple[int, int, int] = (255, 255, 255)
    animated: Literal["refuse", "first"] = "refuse"
    box: Box | None = None
    mirrored: bool = False
    row: Row | None = field(default=None, repr=False, compare=False)

    @property
    def size(self) -> int:
        """Its pixels, as the image processor makes them."""
        return math.prod(self.group[-2:])

    @property
    def weight(self) -> int:
        """Every picture counts the same."""
        return 1

    @property
    def split_key(self) -> str:
        """Copies of one picture are held out together."""
        return self.content

    def digest(self) -> bytes:
        """Return a digest of all that affects training: pixels, label, shape, what is drawn."""
        facts = (self.content, self.label, self.group, self.augmenting, self.background, self.animated)
        return hashlib.sha256(repr(facts).encode()).digest()

    def drawn(self, seed: int, epoch: int) -> LabelledPicture:
        """Draw an epoch's crop and flip: a function of the arguments and the file's content."""
        random = Random(int.from_bytes(hashlib.sha256(f"{seed}/{epoch}/{self.content}".encode()).digest(), "big"))
        # All five numbers are always drawn, so that no setting changes what another one draws.
        flip, area, aspect, x, y = (random.random() for _ in range(5))
        least = self.augmenting.random_crop
        box = self._box(least + (1 - least) * area, aspect, x, y) if least < 1 else None
        return replace(self, box=box, mirrored=self.augmenting.flip and flip < 0.5)

    def _box(self, area: float, aspect: float, x: float, y: float) -> Box:
        """Return a box with this share of the area, as far as it fits. `aspect`, `x`, `y`: in [0, 1)."""
        width, height = self.original
        stretch = math.sqrt(LEAST_ASPECT * (MOST_ASPECT / LEAST_ASPECT) ** aspect)
        kept_w = min(width, width * math.sqrt(area) * stretch)
        kept_h = min(height, height * math.sqrt(area) / stretch)
        left, top = x * (width - kept_w), y * (height - kept_h)
        return (left, top, min(left + kept_w, width), min(top + kept_h, height))

    def image(self) -> Image:
        """Return the picture in RGB at its own size. Raises DataError if the file has gone or is broken."""
        from PIL.Image import Resampling, Transpose

        try:
            data = self.read()
        except OSError as error:
            raise DataError(f"{self.where}: cannot be read: {error.strerror or error}") from error
        image = decode(data, self.where, self.background, self.animated).rgb
        if self.box is not None:  # to the size that it had, so that the image processor makes the same shape of it
            image = image.resize(self.original, Resampling.BICUBIC, box=self.box)
        return image.transpose(Transpose.FLIP_LEFT_RIGHT) if self.mirrored else image
