"""A grid: pixels that stay as they are, labels with room, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lorakit.errors import ConfigError
from lorakit.generate.pictures.grid import LARGEST, SMALLEST, grid


def plain(colour, width=32, height=32):
    return Image.new("RGB", (width, height), colour)


def noise(width, height, seed=0):
    # Never as light as the paper or as dark as the ink.
    return Image.fromarray(np.random.default_rng(seed).integers(60, 200, (height, width, 3)).astype("uint8"))


def position(image, colour):
    """(left, top, right, bottom) of the pixels of a colour."""
    rows, columns = np.nonzero((np.asarray(image) == colour).all(-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_pictures_stand_in_rows_and_columns_enlarged_by_a_whole_number():
    colours = [[(200, 0, 0), (0, 200, 0), (0, 0, 200)], [(200, 200, 0), (0, 200, 200), (200, 0, 200)]]
    image = grid([[plain(c) for c in row] for row in colours], ["base", "style"], ["a", "b", "c"], title="A title")
    at = [[position(image, c) for c in row] for row in colours]
    for row in at:
        assert [right - left for left, _, right, _ in row] == [SMALLEST] * 3
        assert len({top for _, top, _, _ in row}) == 1
        assert row[0][2] < row[1][0]
        assert row[1][2] < row[2][0]
    for upper, lower in zip(*at):
        assert upper[0] == lower[0]
        assert upper[3] < lower[1]


def test_every_pixel_becomes_a_square():
    picture = noise(32, 24)
    image = np.asarray(grid([[picture]], [""], [""]))
    factor = SMALLEST // 32
    expected = np.asarray(picture).repeat(factor, 0).repeat(factor, 1)
    margin = (image.shape[0] - expected.shape[0]) // 2
    inside = image[margin : margin + expected.shape[0], margin : margin + expected.shape[1]]
    np.testing.assert_array_equal(inside, expected)


def test_pictures_of_usual_size_keep_their_pixels_and_larger_ones_are_reduced():
    usual, large = noise(256, 200), plain((200, 0, 0), 2 * LARGEST, LARGEST)
    image = np.asarray(grid([[usual, large]], [""], ["", ""]))
    windows = np.lib.stride_tricks.sliding_window_view(image[:, :, 0], 256, axis=1)
    assert (windows == np.asarray(usual)[0, :, 0]).all(-1).any()
    left, top, right, bottom = position(image, (200, 0, 0))
    assert (right - left, bottom - top) == (LARGEST, LARGEST // 2)


def test_labels_make_room_for_themselves():
    bare = grid([[plain("red")]], [""], [""])
    titled = grid([[plain("red")]], [""], [""], title="A title")
    named = grid([[plain("red")]], ["row"], ["column"])
    noted = grid([[plain("red")]], [""], [""], note="seed 7")
    assert titled.width == bare.width
    assert titled.height > bare.height
    assert named.width > bare.width
    assert named.height > bare.height
    assert noted.height > bare.height
    for image in (titled, named, noted):
        assert (np.asarray(image)[:4] == 255).all(), "text touches the edge"


def test_an_empty_cell_keeps_its_place():
    image = grid([[plain("red"), None], [None, plain((0, 0, 200))]], ["", ""], ["", ""])
    red, blue = position(image, (255, 0, 0)), position(image, (0, 0, 200))
    assert red[2] < blue[0]
    assert red[3] < blue[1]


def test_other_modes_are_drawn_as_rgb():
    palette = plain((200, 0, 0)).quantize()
    assert position(grid([[palette]], [""], [""]), (200, 0, 0))[2] > 0


@pytest.mark.parametrize(
    "pictures, rows, columns",
    [([], [], []), ([[None]], ["a"], ["b"]), ([[plain("red")]], ["a", "b"], ["c"]), ([[plain("red")]], ["a"], [])],
)
def test_pictures_and_names_must_match(pictures, rows, columns):
    with pytest.raises(ConfigError, match="expected a"):
        grid(pictures, rows, columns)
