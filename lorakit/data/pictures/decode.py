"""Any picture file as upright 8-bit RGB, so that one scene gives the same pixels however it was saved.

    orientation   EXIF's is applied
    colour        palette, grey, CMYK, YCbCr, Lab become RGB; a colour profile other than sRGB is converted
    16 bits       v -> round(v / 257)
    transparency  alpha, or one transparent colour (tRNS): composed on a background colour

What cannot be converted without a guess is a DataError that names the file: several frames, 32-bit pixels, truncated
files, types that Pillow does not know.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ...errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
# Pictures too, so that they are refused by name rather than left out as unknown files.
UNREADABLE = (".heic", ".heif", ".jxl")

TURNED = "turned upright, as their EXIF orientation says"
COMPOSED = "transparent parts filled with the background colour"
SIXTEEN = "16 bits a channel reduced to 8"
FIRST_FRAME = "animated or of several pages; the first frame is used"
PROFILE = "colours converted to sRGB from the file's own profile"
CMYK = "converted from CMYK"

# Phones write MPO: a JPEG followed by a depth map or a second view.
_ONE_PICTURE = ("MPO",)
_SHALLOW = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_ORIENTATION = 0x0112  # EXIF's tag


@dataclass(frozen=True)
class Decoded:
    """`rgb`: the picture; `alpha`: its opacity, an image of mode L, None if opaque; `notes`: what was converted."""

    rgb: Image
    alpha: Image | None
    notes: tuple[str, ...]


def colour(name: str) -> tuple[int, int, int]:
    """Return a colour's (red, green, blue). Raises ConfigError for a text that Pillow does not know as a colour."""
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(name)[:3]
    except ValueError:
        raise ConfigError(f"background: '{name}' is no colour\n  expected a name such as white, or #rrggbb") from None


def decode(
    data: bytes,
    where: str,
    background: tuple[int, int, int] = (255, 255, 255),
    animated: Literal["refuse", "first"] = "refuse",
) -> Decoded:
    """Decode a picture file's bytes. `where`: names it in errors. Raises DataError if it cannot be read to its end."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as opened:
            frames = 1 if opened.format in _ONE_PICTURE else getattr(opened, "n_frames", 1)
            if frames > 1 and animated == "refuse":
                raise DataError(
                    f"{where}: {frames} frames or pages; expected one picture\n"
                    "  save the frame you want as a file, or take the first of each: --animated first"
                )
            notes = [FIRST_FRAME] if frames > 1 else []
            if opened.getexif().get(_ORIENTATION, 1) in range(2, 9):  # asked first: TIFF is turned as it is loaded
                notes.append(TURNED)
            opened.load()
            image = _eight_bits(ImageOps.exif_transpose(opened), where)
            if opened.mode not in _SHALLOW:
                notes.append(SIXTEEN)
            return _converted(image, background, notes)
    except DataError:
        raise
    # Pillow's plugins let all errors through (struct.error, SyntaxError, EOFError, ...): any means it cannot be read.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "empty file" if not data else "no picture that Pillow can read"
            if where.lower().endswith((*UNREADABLE, ".avif")):  # Pillow before 11.3 does not read AVIF
                reason += "; convert it to JPEG or PNG"
        raise DataError(f"{where}: broken picture: {reason}") from error


def _converted(image: Image, background: tuple[int, int, int], notes: list[str]) -> Decoded:
    """Convert an 8-bit image of any mode to RGB."""
    from PIL import Image

    if image.mode == "CMYK":
        notes.append(CMYK)
    image = _in_srgb(image, notes)
    if not image.has_transparency_data:
        return Decoded(image if image.mode == "RGB" else image.convert("RGB"), None, tuple(notes))
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    if alpha.getextrema() == (255, 255):  # an alpha channel without a transparent pixel
        return Decoded(rgba.convert("RGB"), None, tuple(notes))
    ground = Image.new("RGBA", rgba.size, (*background, 255))
    return Decoded(Image.alpha_composite(ground, rgba).convert("RGB"), alpha, (*notes, COMPOSED))


def _eight_bits(image: Image, where: str) -> Image:
    """Reduce 16-bit grey to 8 bits; its transparent value (tRNS) becomes an alpha channel. DataError for 32 bits."""
    import numpy as np
    from PIL import Image

    if image.mode in _SHALLOW:
        return image
    if not image.mode.startswith("I;16"):
        raise DataError(
            f"{where}: 32-bit pixels ({image.mode}), whose range the file does not say\n  save it with 8 or 16 bits"
        )
    values = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
        grey = Image.merge("LA", (grey, alpha))
    return grey


def _in_srgb(image: Image, notes: list[str]) -> Image:
    """Convert from the embedded profile to sRGB. A profile that is broken or of other channels is not used."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK", "L", "LA"):
        return image
    from PIL import Image, ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        alpha = image.getchannel("A") if image.mode in ("RGBA", "LA") else None
        colours = image.convert(image.mode[:-1]) if alpha is not None else image
        converted = ImageCms.profileToProfile(colours, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image
    if converted is None:
        return image
    notes.append(PROFILE)
    return converted if alpha is None else Image.merge("RGBA", (*converted.split(), alpha))
