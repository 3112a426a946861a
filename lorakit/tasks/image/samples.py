"""Pictures drawn in training, of the same prompts and seed at each evaluation.

samples/step-200.png        a grid: a row for each prompt; columns base, step 100, step 200
samples/step-200/1.png      each picture by itself, with its prompt, sampler, steps, guidance and seed as PNG text
samples/step-0/1.png        the base's
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    from ...generate.pictures.call import defaults_of
    from ...generate.pictures.generate import generate_pictures
    from ...generate.pictures.png_text import Lora, Parameters
    from ...generate.pictures.schedulers import name_of
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
    sampler, schedule = name_of(pipe.scheduler)
    guidance = defaults_of(pipe).guidance if own.sample_guidance is None else own.sample_guidance
    weight = next(iter(active(base.model).values()), None)
    loras = {ADAPTER: Lora(weight)} if isinstance(weight, float) else {}
    return [
        PictureSample(
            picture,
            Parameters(
                prompt.text,
                own.sample_negative,
                steps=own.sample_steps,
                sampler=sampler,
                schedule=schedule,
                guidance=guidance,
                seed=own.sample_seed,
                width=picture.width,
                height=picture.height,
                loras=loras,
            ),
        )
        for prompt, picture in zip(prompts, pictures, strict=True)
    ]


def base_samples(folder: Path) -> list[PictureSample]:
    """Read the pictures that the base drew; empty if there are none, or one is damaged."""
    try:
        return _read(folder / "step-0")
    except DataError:
        return []


def write_samples(folder: Path, step: int, base: Sequence[PictureSample], tuned: Sequence[PictureSample]) -> Path:
    """Write the step's pictures, and the grid of all steps so far. Returns the grid's path."""
    from ...generate.pictures.grid import grid

    for at, samples in ((0, base), (step, tuned)):
        for number, sample in enumerate(samples, start=1):
            _write(folder / f"step-{at}" / f"{number}.png", sample)
    steps = sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*") if path.is_dir())
    columns: dict[str, list[Any]] = {}
    for at in steps:
        if at <= step:
            found = list(base) if at == 0 else list(tuned) if at == step else _read(folder / f"step-{at}")
            if [sample.prompt for sample in found] == [sample.prompt for sample in base]:
                columns["base" if at == 0 else f"step {at}"] = [sample.picture for sample in found]
    rows = [[pictures[row] for pictures in columns.values()] for row in range(len(base))]
    path = folder / f"step-{step}.png"
    with replacing(path) as temporary:
        grid(rows, [sample.prompt for sample in base], list(columns)).save(temporary, format="PNG")
    return path


def _write(path: Path, sample: PictureSample) -> None:
    from ...generate.pictures.png_text import png_text

    with replacing(path) as temporary:
        sample.picture.save(temporary, format="PNG", pnginfo=png_text(sample.parameters))


def _read(folder: Path) -> list[PictureSample]:
    """Read a step's pictures, in order. Raises DataError for a damaged one."""
    from PIL import Image

    from ...generate.pictures.png_text import read_png

    samples = []
    for path in sorted(folder.glob("*.png"), key=lambda path: int(path.stem)):
        parameters = read_png(path)
        with Image.open(path) as image:
            samples.append(PictureSample(image.convert("RGB"), parameters))
    return samples
