"""Buckets: every picture has one, of nearly its own aspect, and none is enlarged unless asked for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.data.pictures.buckets import Grid, buckets_of, cropped, enlarged
from lorakit.data.pictures.settings import PictureSettings
from lorakit.errors import ConfigError, DataError


def grid(resolution=512, multiple=8, **given):
    return Grid.of(PictureSettings(**given), resolution, multiple)


def test_sizes_are_multiples_of_the_step_within_the_area_and_the_sides_allowed():
    for resolution in (32, 64, 512, 1024):
        mine = grid(resolution)
        sizes = mine.sizes()
        assert (resolution, resolution) in sizes
        assert {(h, w) for w, h in sizes} == set(sizes)
        for size in sizes:
            assert size[0] * size[1] <= resolution**2
            assert all(side % mine.step == 0 and mine.shortest <= side <= mine.longest for side in size)


@settings(max_examples=200, deadline=None)
@given(st.integers(8, 4000), st.integers(8, 4000), st.booleans(), st.booleans())
def test_every_picture_has_a_bucket_and_is_enlarged_only_if_asked_for(width, height, square, upscale):
    mine = grid(buckets=not square, upscale=upscale)
    bucket = mine.bucket((width, height))
    assert bucket is not None
    assert all(side % mine.multiple == 0 and side > 0 for side in bucket)
    if not upscale:
        assert enlarged((width, height), bucket) <= 1
    if square:
        assert bucket[0] == bucket[1]


@settings(max_examples=100, deadline=None)
@given(st.integers(1000, 4000), st.integers(1000, 4000))
def test_no_other_bucket_would_cut_less_away(width, height):
    mine = grid()
    chosen = cropped((width, height), mine.bucket((width, height)))
    assert chosen == min(cropped((width, height), bucket) for bucket in mine.sizes())


@pytest.mark.parametrize(
    "aspect, lost", [((3, 2), 0.03), ((4, 3), 0.04), ((16, 9), 0.02), ((9, 16), 0.02), ((1, 1), 0)]
)
def test_common_aspects_lose_little(aspect, lost):
    size = (aspect[0] * 400, aspect[1] * 400)
    for resolution in (512, 768, 1024):
        assert cropped(size, grid(resolution).bucket(size)) <= lost


def test_the_share_cropped_away_is_that_of_the_area():
    assert cropped((200, 100), (64, 64)) == 0.5
    assert cropped((100, 400), (64, 128)) == 0.5
    assert cropped((300, 200), (96, 64)) == 0


def test_small_pictures_keep_their_size_down_to_the_step():
    assert grid().bucket((300, 200)) == (288, 192)
    assert grid(upscale=True).bucket((300, 200)) == grid().bucket((3000, 2000))
    assert grid().bucket((20, 300)) == (16, 296)  # smaller than a step of 32, so in multiples of 8


def test_pictures_smaller_than_any_bucket_are_named():
    with pytest.raises(DataError, match=r"1 of 2 pictures are smaller than .* 8x8 pixels: b.png \(7x90\)\n.*--upscale"):
        buckets_of([(90, 90), (7, 90)], ["a.png", "b.png"], grid())
    assert buckets_of([(7, 90)], ["b.png"], grid(upscale=True)) == [(256, 1024)]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"resolution": 502}, "resolution: 502 is no multiple of 8.*\n.*504"),
        ({"bucket_step": 12}, "bucket_step: 12 is no multiple of 8"),
        ({"bucket_min": 600}, "bucket_min 600 and bucket_max 1024 leave out the resolution, 512"),
        ({"bucket_max": 256}, "bucket_min <= resolution <= bucket_max"),
    ],
)
def test_sizes_that_a_pipeline_cannot_take_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        grid(**given)


def test_the_resolution_given_comes_before_the_pipelines_own():
    assert grid(resolution=512).resolution == 512
    assert Grid.of(PictureSettings(resolution=256), 512, 8).resolution == 256
