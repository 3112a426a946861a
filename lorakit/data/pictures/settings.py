"""Settings of a data set of pictures. The fields' texts are the help, the docs and the labels."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ...config import Auto, Strict, at_least_one
from ...nondefault import nondefault


class Decoding(Strict):
    """How picture files become RGB."""

    rows: ClassVar = {"background", "animated", "broken"}
    anew: ClassVar = {"background", "animated"}

    background: str = Field("white", description="colour behind transparent parts: a name or #rrggbb")
    animated: Literal["refuse", "first"] = Field(
        "refuse", description="animations and files of several pages: an error, or use the first frame"
    )
    broken: Literal["refuse", "skip"] = Field(
        "refuse", description="pictures that cannot be read: an error that names them, or leave them out with a note"
    )


class Mirroring(Strict):
    rows: ClassVar = {"flip"}

    flip: bool = Field(False, description="mirror pictures left to right, each with probability 1/2 in each epoch")


class PictureSettings(Decoding, Mirroring):
    """How pictures are found, captioned, cropped and resized. Crops, flips and captions are drawn anew each epoch."""

    rows: ClassVar = {
        "resolution",
        "buckets",
        "bucket_step",
        "bucket_min",
        "bucket_max",
        "crop",
        "upscale",
        "caption",
        "trigger",
        "caption_dropout",
        "shuffle_tags",
        "keep_tags",
        "repeats",
        "mask",
        "prior_data",
        "prior_caption",
    }

    resolution: int | Auto = Field(
        "auto",
        description="pictures are trained at about resolution x resolution pixels, in their own aspect; auto: the "
        "pipeline's own",
    )
    buckets: bool = Field(
        True, description="keep each picture's aspect by sizes in steps (aspect buckets); false: all square"
    )
    bucket_step: int | Auto = Field(
        "auto", description="width and height of a bucket are multiples of this; auto: a sixteenth of the resolution"
    )
    bucket_min: int | Auto = Field("auto", description="shortest side of a bucket; auto: half the resolution")
    bucket_max: int | Auto = Field("auto", description="longest side of a bucket; auto: twice the resolution")
    crop: Literal["center", "random", "stretch"] = Field(
        "center",
        description="where to cut what a bucket has no room for: around the center, or anew in each epoch; stretch: "
        "cut nothing, change the aspect",
    )
    upscale: bool = Field(
        False, description="enlarge pictures with fewer pixels than the resolution; false: train them at their own size"
    )
    caption: str | None = Field(None, description="caption of pictures that have none")
    trigger: str | None = Field(
        None, description="trigger word: put before captions without it, and where they say [trigger]"
    )
    caption_dropout: float = Field(
        0.0, ge=0, le=1, description="share of captions left empty, drawn anew in each epoch (for guidance)"
    )
    shuffle_tags: bool = Field(False, description="shuffle the comma-separated parts of captions in each epoch")
    keep_tags: int = Field(
        0, ge=0, description="with shuffle_tags: this many parts at the start stay, beside the trigger word"
    )
    repeats: dict[str, int] = Field(
        default_factory=dict,
        description="how often an epoch has the pictures of a folder: {folder: times}; default: 1, or 10 for a folder "
        "named 10_name",
    )
    mask: str | None = Field(
        None,
        description="where the loss counts: 'alpha' (opaque parts of the pictures), or a folder of masks with the "
        "pictures' names (white counts, black does not)",
    )
    prior_data: str | None = Field(
        None, description="pictures of the class, for prior preservation (DreamBooth): a folder or any other data"
    )
    prior_caption: str | None = Field(None, description="caption of the class's pictures that have none: 'a dog'")

    _sizes = field_validator("resolution", "bucket_step", "bucket_min", "bucket_max")(at_least_one)

    @field_validator("repeats")
    @classmethod
    def _times(cls, value: dict[str, int]) -> dict[str, int]:
        for folder, times in value.items():
            if times < 1:
                raise ValueError(f"'{folder}' is to be seen {times} times; expected at least 1 (or remove the folder)")
        return value

    @model_validator(mode="after")
    def _tags_to_keep(self) -> PictureSettings:
        if self.keep_tags and not self.shuffle_tags:
            raise ValueError("keep_tags says what shuffle_tags leaves in place; give shuffle_tags too")
        return self

    @model_validator(mode="after")
    def _sides_of_buckets(self) -> PictureSettings:
        sides = nondefault(self, ("bucket_min", "bucket_max"))
        if sides and not self.buckets:
            raise ValueError(
                f"{sides[0]} limits the sides of buckets, and with buckets: false all pictures are square; "
                "remove one of the two"
            )
        return self
