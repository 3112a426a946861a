"""One picture as training sees it: its caption, its bucket, and what each epoch draws of it.

item.drawn(seed, epoch)  ->  Drawn(caption, flip, box)      a function of its arguments alone: resuming is exact
item.pixels(drawn)       ->  [3, H, W] float32 in −1..1      H, W: the bucket's
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING, Literal

from ...errors import DataError
from .buckets import Size, cropped
from .captions import shuffled
from .decode import Decoded, decode

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the upright picture


# Random crops are at one of this many places, from one edge to the other, so that their latents can be cached: at most
# 9 of a picture, 18 with flips, however long a run is. The same of the orders of a caption's tags.
PLACES, ORDERS = 9, 16


@dataclass(frozen=True)
class Drawn:
    """What is drawn of an item: the caption, whether it is mirrored (after cropping), and the box that is kept."""

    caption: str
    flip: bool
    box: Box


@dataclass(frozen=True)
class Chances:
    """What is drawn anew in each epoch; see the settings of the same names."""

    flip: bool = False
    crop: Literal["center", "random", "stretch"] = "center"
    caption_dropout: float = 0.0
    shuffle_tags: bool = False
    keep_tags: int = 0
    trigger: str | None = None


@dataclass(frozen=True)
class Mask:
    """Where the loss counts. `read`: a mask file's bytes; None: the picture's own opacity. `content`: its SHA-256."""

    where: str = ""
    content: str = ""
    read: Callable[[], bytes] | None = None


@dataclass(frozen=True)
class PictureItem:
    """`group`: the bucket (width, height); `original`: the upright picture's size; `content`: SHA-256 of its file.

    `repeat`: which of several items of one picture; `is_prior`: of the class's pictures (prior preservation).
    """

    where: str
    caption: str
    group: Size
    original: Size
    content: str
    read: Callable[[], bytes] = field(repr=False, compare=False)
    chances: Chances = Chances()
    repeat: int = 0
    is_prior: bool = False
    mask: Mask | None = None
    background: tuple[int, int, int] = (255, 255, 255)
    animated: Literal["refuse", "first"] = "refuse"
    weight: int = 1

    @property
    def size(self) -> int:
        """Its pixels."""
        return self.group[0] * self.group[1]

    @property
    def split_key(self) -> str:
        """Items with the same key are held out together: all repeats and copies of one picture."""
        return self.content

    @property
    def cropped(self) -> float:
        """The share of the picture that is cropped away."""
        return 0.0 if self.chances.crop == "stretch" else cropped(self.original, self.group)

    def box(self, x: float = 0.5, y: float = 0.5) -> Box:
        """Return the box that is kept, of the bucket's aspect. x, y: 0 keeps the left and top edge, 1 the others."""
        (w, h), (bucket_w, bucket_h) = self.original, self.group
        if self.chances.crop == "stretch":
            return (0.0, 0.0, float(w), float(h))
        kept_w, kept_h = min(w, h * bucket_w / bucket_h), min(h, w * bucket_h / bucket_w)
        left, top = x * (w - kept_w), y * (h - kept_h)
        return (left, top, min(left + kept_w, float(w)), min(top + kept_h, float(h)))  # rounding must not pass the edge

    @cached_property
    def plain(self) -> Drawn:
        """The item as evaluation sees it: the caption as it is, cropped around the center, not mirrored."""
        return Drawn(self.caption, False, self.box())

    def drawn(self, seed: int, epoch: int) -> Drawn:
        """Draw the caption, the flip and the crop of an epoch: a function of the arguments and the file's content."""
        key = f"{seed}/{epoch}/{self.content}/{self.repeat}/{int(self.is_prior)}".encode()
        random = Random(int.from_bytes(hashlib.sha256(key).digest(), "big"))
        chances = self.chances
        # All five numbers are always drawn, so that no setting changes what another one draws.
        flip, dropped, x, y, order = (random.random() for _ in range(5))
        caption = self.caption
        if chances.shuffle_tags:
            of_order = Random(f"{self.content}/{int(order * ORDERS)}")
            caption = shuffled(caption, chances.keep_tags, chances.trigger, of_order)
        return Drawn(
            caption="" if dropped < chances.caption_dropout else caption,
            flip=chances.flip and flip < 0.5,
            box=self.box(_place(x), _place(y)) if chances.crop == "random" else self.box(),
        )

    def decoded(self) -> Decoded:
        """Return the upright picture in RGB, at its own size. Raises DataError if the file has gone or is broken."""
        try:
            data = self.read()
        except OSError as error:
            raise DataError(f"{self.where}: cannot be read: {error.strerror or error}") from error
        return decode(data, self.where, self.background, self.animated)

    def image(self, drawn: Drawn | None = None) -> Image:
        """Return the cropped picture at its bucket's size, in RGB. Without `drawn`: as evaluation sees it."""
        from PIL.Image import Resampling

        return _placed(self.decoded().rgb, self.group, drawn or self.plain, Resampling.LANCZOS)

    def pixels(self, drawn: Drawn | None = None) -> Tensor:
        """Return the picture: [3, H, W] float32 in −1..1. Without `drawn`: as evaluation sees it. Raises DataError."""
        return _tensor(self.image(drawn)) * 2 - 1

    def mask_pixels(self, drawn: Drawn | None = None) -> Tensor | None:
        """Return the mask: [1, H, W] float32 in 0..1, 1 where the loss counts; None if the item has none."""
        from PIL.Image import Resampling

        mask = self.full_mask()
        return None if mask is None else _tensor(_placed(mask, self.group, drawn or self.plain, Resampling.BOX))

    def full_mask(self) -> Image | None:
        """Return the mask of the picture before it is cropped, white where the loss counts; None if it has none."""
        from PIL import Image
        from PIL.Image import Resampling

        if self.mask is None:
            return None
        if self.mask.read is None:
            return self.decoded().alpha or Image.new("L", self.original, 255)
        mask = decode(self.mask.read(), self.mask.where, animated="first").rgb.convert("L")
        return mask if mask.size == self.original else mask.resize(self.original, Resampling.BOX)

    def digest(self) -> bytes:
        """Return a digest of all that affects training: pixels, caption, bucket, what is drawn, mask, weight."""
        facts = (
            self.content,
            self.caption,
            self.group,
            self.chances,
            self.repeat,
            self.is_prior,
            None if self.mask is None else self.mask.content,
            self.background,
            self.animated,
            self.weight,
        )
        return hashlib.sha256(repr(facts).encode()).digest()


def _place(number: float) -> float:
    """One of PLACES shares from 0 to 1, from a number in [0, 1)."""
    return int(number * PLACES) / (PLACES - 1)


def _placed(image: Image, bucket: Size, drawn: Drawn, resampling: int) -> Image:
    from PIL.Image import Transpose

    # Cropped and resized in one step, so that the box need not lie on whole pixels.
    placed = image.resize(bucket, resampling, box=drawn.box)
    return placed.transpose(Transpose.FLIP_LEFT_RIGHT) if drawn.flip else placed


def _tensor(image: Image) -> Tensor:
    """[channels, H, W] float32 in 0..1."""
    import numpy as np
    import torch

    values = torch.from_numpy(np.array(image))  # [H, W, 3] or [H, W]
    return (values if values.ndim == 3 else values[..., None]).permute(2, 0, 1).contiguous().float() / 255
