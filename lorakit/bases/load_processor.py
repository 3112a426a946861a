"""Load what turns a base's pictures or sound into its inputs, and its texts into tokens: transformers' processors.

Pictures are always prepared with Pillow, also where torchvision is installed: the two resize differently, and the same
run must see the same pixels on every machine.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import LorakitError
from .load import from_pretrained, model_path

IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")


def load_image_processor(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load a base's image processor. Raises LorakitError if it has none, or Pillow is missing."""
    check_pillow()
    from transformers import AutoImageProcessor

    _check_file(name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code, "backend": "pil"}
    return from_pretrained(AutoImageProcessor, name, **options)


def check_pillow() -> None:
    """Raise LorakitError if Pillow is missing, which says how to install it."""
    if find_spec("PIL") is None:
        raise LorakitError("pictures need Pillow, which is not installed\n  pip install pillow, or 'lorakit[image]'")


def _check_file(name: str) -> None:
    """Raise LorakitError for a folder without settings of an image processor, in place of a guess at them."""
    folder = Path(model_path(name))
    if folder.is_dir() and not any((folder / file).is_file() for file in IMAGE_FILES):
        raise LorakitError(
            f"'{name}' has no image processor: {IMAGE_FILES[0]} is missing, which says how large its pictures are and "
            "how their colours are scaled\n  put the file of the base into the folder"
        )
