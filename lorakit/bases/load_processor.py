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


def load_vision_processor(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the processor of a vision-language model: with a tokenizer and an image processor.

    Raises LorakitError if the base has none, or if a package that it needs is missing.
    """
    check_pillow()
    from transformers import AutoProcessor

    options = {"revision": revision, "trust_remote_code": trust_remote_code, "backend": "pil"}
    try:
        processor = from_pretrained(AutoProcessor, name, **options)
    except LorakitError as error:
        said = str(error).lower()
        if find_spec("torchvision") is not None or not ("torchvision" in said or "video processor" in said):
            raise
        raise LorakitError(
            f"{str(error).splitlines()[0]}\n"
            "  pip install torchvision: transformers' processor of this base needs it for videos, also for rows with "
            "pictures alone"
        ) from error
    parts = ("tokenizer", "image_processor", "image_token", "image_token_id", "replace_image_token")
    missing = [part for part in parts if getattr(processor, part, None) is None]
    if missing:
        raise LorakitError(
            f"'{name}' has no processor of texts with pictures: its {type(processor).__name__} has no {missing[0]}\n"
            "  expected a vision-language model with its processor_config.json, such as LLaVA"
        )
    return processor


def load_speech_processor(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the processor of a speech model: with a tokenizer and a feature extractor. Raises LorakitError without."""
    from transformers import AutoProcessor

    processor = from_pretrained(AutoProcessor, name, revision=revision, trust_remote_code=trust_remote_code)
    missing = [part for part in ("tokenizer", "feature_extractor") if getattr(processor, part, None) is None]
    if missing:
        raise LorakitError(
            f"'{name}' has no processor of speech: its {type(processor).__name__} has no {missing[0]}\n"
            "  expected a Whisper with its preprocessor_config.json"
        )
    return processor
