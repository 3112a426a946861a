"""The class's pictures for prior preservation (DreamBooth, Ruiz et al. 2023): given, or drawn by the base beforehand.

Drawn ones are kept in the run's folder, `prior/<hash>/00001.png`, with a hash of all that they are drawn from: a run
that starts over with another model or caption draws others. Each has a seed of its own, so those that are missing when
a run resumes are drawn again as they were.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ...config import RunSettings, part
from ...data.pictures.settings import PictureSettings
from ...errors import ConfigError
from ...io.atomic import replacing
from .fit import check_scheduler

if TYPE_CHECKING:
    from ..text_to_image import TextToImageSettings
    from .encoded import Pictures

FOLDER = "prior"
DIGITS = 12  # of the hash
AT_ONCE = 8  # pictures drawn and written together


def with_prior(config: RunSettings, own: TextToImageSettings, pictures: Pictures) -> PictureSettings:
    """Return the settings to read the pictures with; the class's are drawn now if `prior_count` asks for some.

    Raises ConfigError for settings that contradict each other, or do not fit the pipeline's scheduler.
    """
    settings = part(own, PictureSettings)
    if not own.prior_count:
        return settings
    if own.prior_data is not None:
        raise ConfigError("prior_count: the class's pictures are given (prior_data)\n  give one of the two")
    if not own.prior_caption:
        raise ConfigError("prior_count: say what to draw\n  give prior_caption, such as 'a dog'")
    check_scheduler(pictures.pipe.scheduler, pictures.diffusion)  # rather than after they are drawn
    folder = Path(config.out) / FOLDER / _drawn_from(config, own, pictures)
    _draw(pictures, folder, own.prior_caption, own.prior_count, config.seed, own.sample_guidance)
    return settings.replace(prior_data=str(folder))


def _drawn_from(config: RunSettings, own: TextToImageSettings, pictures: Pictures) -> str:
    """Return a hash of the pipeline and the settings that the pictures are drawn with."""
    from ...generate.pictures.identity import model_hash

    model = model_hash(pictures.pipe, config.model)
    drawn_from = [model, own.prior_caption, own.prior_count, config.seed, own.sample_guidance]
    return hashlib.sha256(json.dumps(drawn_from).encode()).hexdigest()[:DIGITS]


def _draw(pictures: Pictures, folder: Path, prompt: str, count: int, seed: int, guidance: float | None) -> None:
    """Draw the pictures that are not there yet: `folder/00001.png`, ..."""
    from ...generate.pictures.generate import generate_pictures

    missing = [n for n in range(1, count + 1) if not (folder / f"{n:05}.png").exists()]
    for start in range(0, len(missing), AT_ONCE):
        numbers = missing[start : start + AT_ONCE]
        seeds = [(seed << 31) + number for number in numbers]
        drawn = generate_pictures(pictures.pipe, [prompt] * len(numbers), seed=seeds, guidance=guidance)
        for number, picture in zip(numbers, drawn, strict=True):
            with replacing(folder / f"{number:05}.png") as temporary:
                picture.save(temporary, format="PNG")
