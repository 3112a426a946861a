"""One scene gives the same pixels however it was saved; what cannot be read is named."""

from __future__ import annotations

import io

import numpy as np
import pytest
from made_pictures import scene
from PIL import Image, ImageCms, features

from lorakit.data.pictures.decode import CMYK, COMPOSED, FIRST_FRAME, PROFILE, SIXTEEN, SUFFIXES, TURNED, colour, decode
from lorakit.errors import ConfigError, DataError

AVIF = pytest.param("AVIF", marks=pytest.mark.skipif(not features.check("avif"), reason="Pillow before 11.3"))


def saved(image: Image.Image, file_type: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, file_type, **options)
    return out.getvalue()


def pixels(data: bytes, **how) -> np.ndarray:
    return np.asarray(decode(data, "it", **how).rgb)


def turned_by_exif(file_type: str) -> bytes:
    """The scene stored turned by 90 degrees, with the tag that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rows are the picture's right side
    options = {"lossless": True} if file_type == "WEBP" else {}
    return saved(scene().transpose(Image.Transpose.ROTATE_90), file_type, exif=exif, **options)


def with_alpha(value: int = 255) -> Image.Image:
    image = scene().convert("RGBA")
    image.putalpha(Image.new("L", image.size, value))
    return image


def on_transparent_colour() -> bytes:
    """The scene in RGB with one colour marked as transparent (tRNS), which it does not contain."""
    return saved(scene(), transparency=(1, 2, 3))


SAVED = {
    "png": lambda: saved(scene()),
    "bmp": lambda: saved(scene(), "BMP"),
    "tiff": lambda: saved(scene(), "TIFF", compression="tiff_lzw"),
    "webp": lambda: saved(scene(), "WEBP", lossless=True),
    "opaque alpha": lambda: saved(with_alpha()),
    "tRNS": on_transparent_colour,
    "turned by EXIF, PNG": lambda: turned_by_exif("PNG"),
    "turned by EXIF, WebP": lambda: turned_by_exif("WEBP"),
    "cmyk": lambda: saved(scene().convert("CMYK"), "TIFF"),
    "an sRGB profile": lambda: saved(
        scene(), icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    ),
    "a broken profile": lambda: saved(scene(), icc_profile=b"nothing that is a profile"),
}


@pytest.mark.parametrize("how", SAVED)
def test_the_same_scene_gives_the_same_pixels_however_it_was_saved(how):
    np.testing.assert_array_equal(pixels(SAVED[how]()), np.asarray(scene()))


def test_a_palette_gives_the_colours_it_names():
    palette = scene().quantize(64)
    np.testing.assert_array_equal(pixels(saved(palette)), np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(pixels(saved(palette, "GIF")), np.asarray(palette.convert("RGB")))


def test_grey_pictures_of_1_8_and_16_bits_give_the_same_pixels():
    black_and_white = scene().convert("L").point(lambda value: 255 * (value > 100))
    expected = np.asarray(black_and_white.convert("RGB"))
    sixteen = Image.fromarray(np.asarray(black_and_white).astype(np.uint16) * 257)
    for data in (
        saved(black_and_white),
        saved(black_and_white.convert("1")),
        saved(sixteen),
        saved(sixteen, "TIFF"),
        saved(Image.merge("LA", (black_and_white, Image.new("L", black_and_white.size, 255)))),
    ):
        np.testing.assert_array_equal(pixels(data), expected)
    assert decode(saved(sixteen), "it").notes == (SIXTEEN,)


def test_every_value_of_16_bits_is_rounded_to_the_nearest_of_8():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values.astype(np.float64) / 257).astype(np.uint8)
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(values)))[..., 0], expected)


@pytest.mark.parametrize("file_type", ["JPEG", AVIF])
def test_lossy_files_come_close(file_type):
    found = pixels(saved(scene(), file_type, quality=100)).astype(int)
    assert np.abs(found - np.asarray(scene()).astype(int)).mean() < 8


def test_a_printers_jpeg_in_cmyk_comes_close():
    found = pixels(saved(scene().convert("CMYK"), "JPEG", quality=100)).astype(int)
    assert np.abs(found - np.asarray(scene()).astype(int)).mean() < 3


def test_transparency_is_composed_on_white_or_the_given_colour():
    half = decode(saved(with_alpha(128)), "it")
    on_white = np.asarray(scene()) * (128 / 255) + 255 * (127 / 255)
    assert np.abs(np.asarray(half.rgb) - on_white).max() <= 1  # Pillow's integers against float64
    assert half.notes == (COMPOSED,)
    assert half.alpha.getextrema() == (128, 128)
    np.testing.assert_array_equal(pixels(saved(with_alpha(0)), background=colour("#ff0000"))[0, 0], (255, 0, 0))


def test_a_transparent_palette_entry_is_composed_too():
    palette = scene().quantize(16)
    found = decode(saved(palette, transparency=palette.getpixel((0, 0))), "it")
    assert found.rgb.getpixel((0, 0)) == (255, 255, 255)
    assert found.notes == (COMPOSED,)


def test_a_transparent_grey_of_16_bits_is_composed_too():
    values = np.full((4, 4), 1000, np.uint16)
    values[0, 0] = 30000
    found = decode(saved(Image.fromarray(values), transparency=30000), "it")
    assert found.rgb.getpixel((0, 0)) == (255, 255, 255)
    assert found.rgb.getpixel((1, 1)) == (4, 4, 4)


def test_what_was_converted_is_noted():
    assert decode(turned_by_exif("PNG"), "it").notes == (TURNED,)
    assert decode(SAVED["cmyk"](), "it").notes == (CMYK,)
    assert decode(saved(scene()), "it").notes == ()


def swapped_profile() -> bytes:
    """sRGB's profile with the primaries red and green exchanged, under another name."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))


@pytest.mark.parametrize("alpha", [False, True])
def test_colours_of_another_profile_become_srgb(alpha):
    image = with_alpha(0) if alpha else scene()
    found = decode(saved(image, icc_profile=swapped_profile()), "it")
    assert found.notes[0] == PROFILE
    if alpha:
        assert found.rgb.getpixel((5, 5)) == (255, 255, 255)
    else:
        expected = np.asarray(scene()).astype(int)[..., [1, 0, 2]]
        assert np.abs(np.asarray(found.rgb) - expected).max() <= 1


def animation(file_type: str) -> bytes:
    return saved(scene(), file_type, save_all=True, append_images=[scene(seed=1), scene(seed=2)])


@pytest.mark.parametrize("file_type", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_and_files_of_several_pages_are_refused_by_name_unless_the_first_is_asked_for(file_type):
    with pytest.raises(DataError, match=r"^cat\.gif: 3 frames or pages.*\n.*--animated first"):
        decode(animation(file_type), "cat.gif")
    first = decode(animation(file_type), "cat.gif", animated="first")
    assert first.notes == (FIRST_FRAME,)
    assert np.abs(np.asarray(first.rgb).astype(int) - np.asarray(scene()).astype(int)).mean() < 6


def test_a_phones_jpeg_with_a_second_view_is_one_picture():
    data = saved(scene(), "MPO", save_all=True, append_images=[scene(seed=1)])
    assert decode(data, "it").rgb.size == (48, 32)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_pixels_are_refused_as_their_range_is_unknown(mode):
    with pytest.raises(DataError, match=r"x\.tiff: 32-bit pixels"):
        decode(saved(scene().convert("L").convert(mode), "TIFF"), "x.tiff")


@pytest.mark.parametrize("file_type", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", AVIF])
@pytest.mark.parametrize("kept", [0.5, 0.97])
def test_a_truncated_file_is_named(file_type, kept):
    data = saved(scene(160, 120), file_type)
    with pytest.raises(DataError, match=r"^a/b\.x: broken picture: "):
        decode(data[: int(len(data) * kept)], "a/b.x")


@pytest.mark.parametrize("data, reason", [(b"", "empty file"), (b"hello", "no picture that Pillow can read")])
def test_what_is_no_picture_is_named(data, reason):
    with pytest.raises(DataError, match=f"it: broken picture: {reason}"):
        decode(data, "it")


def test_a_picture_too_large_to_be_meant_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="exceeds limit"):
        decode(saved(scene()), "it")


def test_a_background_that_is_no_colour_is_refused():
    assert colour("navy") == (0, 0, 128)
    with pytest.raises(ConfigError, match="'whit' is no colour"):
        colour("whit")


def test_every_suffix_is_one_that_pillow_opens():
    known = Image.registered_extensions()
    assert all(suffix in known for suffix in SUFFIXES if suffix != ".avif" or features.check("avif"))
