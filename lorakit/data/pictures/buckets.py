"""Aspect buckets: the size in pixels that each picture is trained at.

Rows of a batch must have one size. A bucket is a width and a height, both multiples of a step, with at most
resolution² pixels; a picture goes into the bucket closest to its own aspect a = width / height:

    enlarged by  max(W / w, H / h)  to cover the bucket, cropped away  1 − min(a / A, A / a)  of it

A picture that the bucket would enlarge is trained at its own size, rounded down to the step, unless enlarging is asked
for. No picture is ever dropped: a bucket of one picture is a batch of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import ConfigError, DataError, listing
from .settings import PictureSettings

# A sixteenth of the resolution: 3:2 pictures lose 2.6 %, 4:3 3.6 %, 16:9 1.6 %. With an eighth (the usual step of 64
# pixels at 512) 3:2 pictures lose 10 %.
STEPS_OF_RESOLUTION = 16
CROPPED_MUCH = 0.15  # a share from which on a subject at the edge is likely to be cut

Size = tuple[int, int]  # width, height in pixels


@dataclass(frozen=True)
class Grid:
    """The sizes to choose from. `multiple`: of which the pipeline needs all sides to be multiples."""

    resolution: int
    step: int
    shortest: int
    longest: int
    multiple: int
    square: bool
    upscale: bool

    @classmethod
    def of(cls, settings: PictureSettings, resolution: int, multiple: int) -> Grid:
        """Resolve 'auto'. `resolution`: the pipeline's own. ConfigError for sizes that the pipeline cannot take."""
        if settings.resolution != "auto":
            resolution = settings.resolution
        if settings.bucket_step == "auto":
            step = max(resolution // STEPS_OF_RESOLUTION, multiple)
            step = -(-step // multiple) * multiple
        else:
            step = settings.bucket_step
        shortest = resolution // 2 if settings.bucket_min == "auto" else settings.bucket_min
        longest = resolution * 2 if settings.bucket_max == "auto" else settings.bucket_max
        for name, value in (("resolution", resolution), ("bucket_step", step)):
            if value % multiple:
                fits = max(multiple, round(value / multiple) * multiple)
                raise ConfigError(
                    f"{name}: {value} is no multiple of {multiple}, which the pipeline needs\n  for example {fits}"
                )
        if settings.buckets and not shortest <= resolution <= longest:
            raise ConfigError(
                f"bucket_min {shortest} and bucket_max {longest} leave out the resolution, {resolution}; expected "
                "bucket_min <= resolution <= bucket_max"
            )
        return cls(resolution, step, shortest, longest, multiple, not settings.buckets, settings.upscale)

    def sizes(self) -> list[Size]:
        """List the buckets of large pictures: for each width the largest height, and the same turned by 90 degrees."""
        if self.square:
            return [(self.resolution, self.resolution)]
        area = self.resolution**2
        found = {(self.resolution, self.resolution)}
        for side in range(-(-self.shortest // self.step) * self.step, self.longest + 1, self.step):
            other = min(area // side, self.longest) // self.step * self.step
            if other >= self.shortest:
                found |= {(side, other), (other, side)}
        return sorted(found)

    def bucket(self, size: Size) -> Size | None:
        """Return the bucket of a picture of this size; None if it is smaller than any."""
        best = min(self.sizes(), key=lambda bucket: (cropped(size, bucket), -bucket[0] * bucket[1]))
        if self.upscale or enlarged(size, best) <= 1:
            return best
        width, height = (min(side, self.resolution if self.square else self.longest) for side in size)
        if self.square:
            width = height = min(width, height)
        step = self.step if min(width, height) >= self.step else self.multiple
        small = (width // step * step, height // step * step)
        return small if min(small) else None


def enlarged(size: Size, bucket: Size) -> float:
    """Return the factor that a picture is enlarged by to cover its bucket; below 1 it is reduced."""
    return max(bucket[0] / size[0], bucket[1] / size[1])


def cropped(size: Size, bucket: Size) -> float:
    """Return the share of a picture that lies outside its bucket."""
    aspects = size[0] * bucket[1], bucket[0] * size[1]
    return 1 - min(aspects) / max(aspects)


def buckets_of(sizes: Sequence[Size], places: Sequence[str], grid: Grid) -> list[Size]:
    """Return the bucket of each picture. Raises DataError, naming them, for pictures smaller than any bucket."""
    found = [grid.bucket(size) for size in sizes]
    small = [f"{place} ({w}x{h})" for place, (w, h), bucket in zip(places, sizes, found, strict=True) if bucket is None]
    if small:
        raise DataError(
            f"{len(small)} of {len(sizes)} pictures are smaller than the smallest bucket, "
            f"{grid.multiple}x{grid.multiple} pixels: {listing(small)}\n  remove them, or enlarge them: --upscale"
        )
    return [bucket for bucket in found if bucket is not None]
