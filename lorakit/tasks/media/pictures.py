"""Read pictures with labels into items: each is decoded once, so that broken ones are named before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ...data.label_names import number_of, ordered
from ...data.pictures.buckets import Size
from ...data.pictures.check import check_pictures
from ...data.pictures.decode import colour
from ...data.pictures.labelled import find_labelled
from ...data.pictures.labelled_item import Augmenting, LabelledPicture
from ...errors import DataError, LorakitError

if TYPE_CHECKING:
    from ..image_classification import ImageClassificationSettings

SIZES = 3  # of pictures that the start panel lists


@dataclass(frozen=True)
class LabelledPictures:
    """`names`: of the labels, in the order of their numbers; `notes`: message -> number of pictures; `sizes`: their
    number and sizes, for the start panel.
    """

    items: list[LabelledPicture]
    names: list[str]
    notes: dict[str, int]
    sizes: str


def read_labelled_pictures(
    source: str,
    split: str | None,
    settings: ImageClassificationSettings,
    processor: Any,
    names: Sequence[str] = (),
    needed: bool = True,
) -> LabelledPictures:
    """Read the pictures of a source. `names`: of the labels; empty: those of the source, in order.

    `needed`: whether each must have a label. Raises DataError, naming them, for pictures that are broken or have no
    label, or a label that is none of `names`.
    """
    background = colour(settings.background)
    read = find_labelled(source, split, settings.columns, needed)
    checked, notes = check_pictures(read.source, settings, background)
    of_picture = {id(found): index for index, found in enumerate(read.source.pictures)}
    names = list(names) or read.names or ordered(label for label in read.labels if label is not None)
    shape_of = _shapes(processor)
    augmenting = Augmenting(settings.flip, settings.random_crop)
    items = []
    for one in checked:
        index = of_picture[id(one.found)]
        label = read.labels[index]
        items.append(
            LabelledPicture(
                where=one.where,
                label=None if label is None else number_of(label, names, one.where),
                original=one.size,
                content=one.content,
                group=shape_of(one.size),
                read=one.found.read,
                augmenting=augmenting,
                background=background,
                animated=settings.animated,
                row=read.rows[index],
            )
        )
    return LabelledPictures(items, names, read.source.notes | notes, _sizes(items))


def _shapes(processor: Any) -> Any:
    """Return a function from a picture's size to the shape that the image processor makes of it, [channels, H, W]."""
    from PIL import Image

    @cache
    def shape_of(size: Size) -> tuple[int, ...]:
        try:
            made = processor(images=[Image.new("RGB", size)], return_tensors="pt")["pixel_values"]
        # Processors of many models, with settings from a file: any error means that they do not take this picture.
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise LorakitError(
                f"the base's {type(processor).__name__} does not take a picture of {size[0]} x {size[1]} pixels: "
                f"{reason}\n  resize the picture, or see the base's preprocessor_config.json"
            ) from error
        if made.dim() != 4:
            raise DataError(
                f"the base's {type(processor).__name__} makes values of shape {list(made.shape)} of a picture; "
                "expected [1, channels, height, width]\n  choose a base for image classification (--model)"
            )
        return tuple(made.shape[1:])

    return shape_of


def _sizes(items: Sequence[LabelledPicture]) -> str:
    counts = Counter(f"{item.group[-1]} x {item.group[-2]}" for item in items)
    shown = ", ".join(f"{count:,} of {size}" for size, count in counts.most_common(SIZES))
    return f"{len(items):,} as the image processor makes them: {shown}{', ...' * (len(counts) > SIZES)}"
