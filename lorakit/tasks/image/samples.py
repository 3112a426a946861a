"""Pictures drawn in training, of the same prompts and seed at each evaluation.

samples/step-200.png        a grid: a row for each prompt; columns base, step 100, step 200
samples/step-200/1.png      each picture by itself, with its prompt, sampler, steps, guidance and seed as PNG text
samples/step-0/1.png        the base's
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DataError
from ...io.atomic import replacing
from ..task import Base, Data

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...generate.pictures.png_text import Parameters
    from ..text_to_image import TextToImageSettings

MOST_PROMPTS = 2  # where none are given
ADAPTER = "adapter"  # the name of the result in the PNG text
_STEP, _PICTURE = re.compile(r"step-(\d+)"), re.compile(r"(\d+)\.png")


@dataclass(frozen=True)
class PicturePrompt:
    text: str
    size: tuple[int, int] | None  # width and height; None: the pipeline's own


@dataclass(frozen=True)
class PictureSample:
    """A picture, and what it was made from."""

    picture: Image
    parameters: Parameters

    text = None

    @property
    def prompt(self) -> str:
        return self.parameters.prompt

    @property
    def made_from(self) -> str:
        """All that the picture was made from but the adapter, as its PNG says it."""
        return _without_adapter(self.parameters)


def prompts(own: TextToImageSettings, data: Data) -> list[PicturePrompt]:
    """Return the prompts that are given, or captions of held-out pictures or, without those, of training ones."""
    if not own.sample_steps:
        return []
    size = None if own.resolution == "auto" else (int(own.resolution), int(own.resolution))
    items = [*data.held_out, *(item for item in data.train if not item.is_prior)]
    texts = own.sample_prompts or list(dict.fromkeys(item.caption for item in items))[:MOST_PROMPTS]
    return [PicturePrompt(text, size) for text in texts]


def draw(own: TextToImageSettings, base: Base, prompts: Sequence[PicturePrompt]) -> list[PictureSample]:
    """Draw a picture for each prompt with the pipeline as it is now."""
    from ...generate.pictures.generate import generate_pictures
    from ...generate.pictures.png_text import Lora
    from ...model.activate import active

    if not prompts:
        return []
    pipe = base.processor.pipe
    width, height = prompts[0].size or (None, None)
    pictures = generate_pictures(
        pipe,
        [prompt.text for prompt in prompts],
        seed=own.sample_seed,
        steps=own.sample_steps,
        guidance=own.sample_guidance,
        negative=own.sample_negative,
        width=width,
        height=height,
    )
    weight = next(iter(active(base.model).values()), None)
    loras = {ADAPTER: Lora(weight)} if isinstance(weight, float) else {}
    return [
        PictureSample(picture, replace(_parameters(own, base, prompt.text, picture.size), loras=loras))
        for prompt, picture in zip(prompts, pictures, strict=True)
    ]


def _parameters(own: TextToImageSettings, base: Base, prompt: str, size: tuple[int, int]) -> Parameters:
    """Return what a picture of the base is made from. `size`: its width and height."""
    from ...bases.pipeline import denoisers_of
    from ...generate.pictures.call import defaults_of
    from ...generate.pictures.identity import PROGRAM, libraries, model_name, precision_name, public_source
    from ...generate.pictures.png_text import Parameters
    from ...generate.pictures.schedulers import name_of

    pipe, model = base.processor.pipe, base.config.model
    sampler, schedule = name_of(pipe.scheduler)
    return Parameters(
        prompt,
        own.sample_negative,
        steps=own.sample_steps,
        sampler=sampler,
        schedule=schedule,
        guidance=defaults_of(pipe).guidance if own.sample_guidance is None else own.sample_guidance,
        seed=own.sample_seed,
        width=size[0],
        height=size[1],
        model=model_name(model),
        model_source=public_source(model),
        precision=precision_name(pipe.components[denoisers_of(pipe)[0]].dtype),
        libraries=libraries(),
        version=PROGRAM,
    )


def base_samples(
    folder: Path, own: TextToImageSettings, base: Base, prompts: Sequence[PicturePrompt]
) -> list[PictureSample]:
    """Read the pictures that the base drew of these prompts with these settings; empty if there are others, or one is
    damaged.
    """
    found = _read(folder / "step-0")
    if len(found) != len(prompts):
        return []
    for prompt, sample in zip(prompts, found):
        expected = _parameters(own, base, prompt.text, prompt.size or sample.picture.size)
        if sample.made_from != _without_adapter(expected):
            return []
    return found


def write_samples(folder: Path, step: int, base: Sequence[PictureSample], tuned: Sequence[PictureSample]) -> Path:
    """Write the step's pictures, and the grid of all steps so far. Returns the grid's path."""
    from ...generate.pictures.grid import grid

    for at, samples in ((0, base), (step, tuned)):
        for number, sample in enumerate(samples, start=1):
            _write(folder / f"step-{at}" / f"{number}.png", sample)
        for number, path in _numbered(folder / f"step-{at}", _PICTURE):
            if number > len(samples):  # of more prompts, before the run was resumed with these
                path.unlink()
    columns: dict[str, list[Any]] = {"base": [sample.picture for sample in base]}
    made_from = [sample.made_from for sample in base]
    for at, path in _numbered(folder, _STEP):
        found = _read(path) if 0 < at < step else []
        if [sample.made_from for sample in found] == made_from:
            columns[f"step {at}"] = [sample.picture for sample in found]
    columns[f"step {step}"] = [sample.picture for sample in tuned]
    rows = [[pictures[row] for pictures in columns.values()] for row in range(len(base))]
    path = folder / f"step-{step}.png"
    with replacing(path) as temporary:
        grid(rows, [sample.prompt for sample in base], list(columns)).save(temporary, format="PNG")
    return path


def _write(path: Path, sample: PictureSample) -> None:
    from ...generate.pictures.png_text import png_text

    with replacing(path) as temporary:
        sample.picture.save(temporary, format="PNG", pnginfo=png_text(sample.parameters))


def _without_adapter(parameters: Parameters) -> str:
    from ...generate.pictures.png_text import to_text

    return to_text(replace(parameters, loras={}, version=None))


def _read(folder: Path) -> list[PictureSample]:
    """Read a step's pictures, in order; none if one of them is damaged."""
    from PIL import Image

    from ...generate.pictures.png_text import read_png

    samples = []
    for _, path in _numbered(folder, _PICTURE):
        try:
            parameters = read_png(path)
            with Image.open(path) as image:
                samples.append(PictureSample(image.convert("RGB"), parameters))
        except (DataError, OSError):  # pictures to look at: the run goes on without them
            return []
    return samples


def _numbered(folder: Path, name: re.Pattern[str]) -> list[tuple[int, Path]]:
    """List what a folder has of this name, with its number, in order."""
    paths = folder.iterdir() if folder.is_dir() else []
    return sorted((int(found[1]), path) for path in paths if (found := name.fullmatch(path.name)))
