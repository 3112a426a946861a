"""How good the exported pipeline is: a judge's table, and a grid of samples to look at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from lorakit.reproduce.emoji.captions import BACKGROUNDS, OBJECTS, held_out, pairs, prompt
from lorakit.reproduce.emoji.judge import Judge, load_judge, measure_on_real_pictures
from lorakit.reproduce.emoji.pictures import SEED, scenes
from lorakit.reproduce.emoji.styles import STYLES

from .autoencoder import VALIDATED_ON, psnr, reconstruct
from .pipeline import load, megabytes

GUIDANCE = 3.0
AT_ONCE = 64  # samples
ROWS = ("panda", "cat", "frog", "butterfly", "strawberry", "pizza", "mushroom", "cactus", "rocket", "car", "house")
COLUMNS = ("red", "yellow", "blue", "black", "meadow", "sea", "desert", "snow", "night", "sunset")
CELL, LABEL = 68, 72  # pixels; a picture is drawn at twice its size


@dataclass
class Sampler:
    """Draws prompts with a pipeline. Each sample has its own noise, whatever is drawn with it."""

    pipeline: StableDiffusionPipeline
    steps: int

    @torch.no_grad()
    def __call__(self, prompts: list[str], seed: int, guidance: float = GUIDANCE) -> Tensor:
        """[n, 3, 32, 32] in -1..1."""
        pictures = []
        for start in range(0, len(prompts), AT_ONCE):
            some = prompts[start : start + AT_ONCE]
            drawn = self.pipeline(
                some,
                num_inference_steps=self.steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(seed + start + n) for n in range(len(some))],
                output_type="pt",
            ).images
            pictures.append(drawn * 2 - 1)
        return torch.cat(pictures)


@torch.no_grad()
def shares(judge: Judge, pictures: Tensor, asked: list[tuple[int, int]]) -> dict[str, float]:
    """Shares of the pictures whose object and background the judge names as asked for."""
    things, backgrounds = (logits.argmax(1) for logits in judge(pictures))
    right = torch.tensor(asked)
    return {
        "object": (things == right[:, 0]).float().mean().item(),
        "background": (backgrounds == right[:, 1]).float().mean().item(),
    }


def judged(sampler: Sampler, judge: Judge, count: int, held: bool, size: str = "", guidance: float = GUIDANCE) -> dict:
    """Shares over `count` prompts of pairs that are held out, or of pairs that are not."""
    rng = np.random.default_rng(SEED)
    chosen = [pairs(held)[n] for n in rng.permutation(np.arange(count) % len(pairs(held)))]
    names = list(BACKGROUNDS)
    prompts = [prompt(OBJECTS[thing].word, names[background], size) for thing, background in chosen]
    return shares(judge, sampler(prompts, seed=1000, guidance=guidance), chosen)


@torch.no_grad()
def autoencoder_quality(pipeline: StableDiffusionPipeline) -> dict[str, float]:
    """PSNR in dB of pictures through the autoencoder, and of pictures in the styles that it was shown."""
    pictures = scenes("validation", 0, VALIDATED_ON).pictures
    kinds = {"scenes": pictures, **{name: style(pictures) for name, style in STYLES.items()}}
    return {name: psnr(reconstruct(pipeline.vae, kind), kind) for name, kind in kinds.items()}


def measure(sampler: Sampler, judge: Judge, count: int) -> dict:
    """All measures, as they are written to evaluation.json."""
    return {
        "samples": count,
        "steps": sampler.steps,
        "guidance": GUIDANCE,
        "seen pairs": judged(sampler, judge, count, held=False),
        "pairs never seen": judged(sampler, judge, count, held=True),
        "seen pairs, small": judged(sampler, judge, count // 2, held=False, size="small"),
        "seen pairs, guidance 1": judged(sampler, judge, count // 2, held=False, guidance=1.0),
        "real pictures": measure_on_real_pictures(judge),
        "autoencoder, dB": autoencoder_quality(sampler.pipeline),
    }


def table(measures: dict) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield f"| {measures['samples']} samples, {measures['steps']} steps, guidance {GUIDANCE:g} | object | background |"
    yield "|---|---|---|"
    for name, row in measures.items():
        if isinstance(row, dict) and "object" in row:
            yield f"| {name} | {row['object']:.1%} | {row['background']:.1%} |"


def to_image(picture: Tensor, scale: int = 2) -> Image.Image:
    pixels = ((picture + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((32 * scale, 32 * scale), Image.Resampling.NEAREST)


def labelled_grid(pictures: Tensor, rows: list[str], columns: list[str], framed: list[bool]) -> Image.Image:
    """Pictures row by row, with names at the left and on top; some with a frame."""
    grid = Image.new("RGB", (LABEL + CELL * len(columns), 16 + CELL * len(rows)), "white")
    draw = ImageDraw.Draw(grid)
    for n, name in enumerate(columns):
        draw.text((LABEL + CELL * n + 4, 2), name, fill="black")
    for n, name in enumerate(rows):
        draw.text((4, 16 + CELL * n + 26), name, fill="black")
    for n, picture in enumerate(pictures):
        row, column = divmod(n, len(columns))
        left, top = LABEL + CELL * column, 16 + CELL * row
        if framed[n]:
            draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), fill="orange")
        grid.paste(to_image(picture), (left + 2, top + 2))
    return grid


def sample_grid(sampler: Sampler) -> Image.Image:
    """Objects by backgrounds; pairs that were never trained on have an orange frame."""
    words, names = [emoji.word for emoji in OBJECTS], list(BACKGROUNDS)
    prompts, framed = [], []
    for thing in ROWS:
        for background in COLUMNS:
            prompts.append(prompt(thing, background))
            framed.append(held_out(words.index(thing), names.index(background)))
    return labelled_grid(sampler(prompts, seed=1), list(ROWS), list(COLUMNS), framed)


def object_grid(sampler: Sampler, backgrounds: tuple[str, ...] = ("white", "meadow")) -> Image.Image:
    """Every object of the base model, on two backgrounds, four objects to a row."""
    cells = [(emoji.word, background) for emoji in OBJECTS for background in backgrounds]
    across = 4 * len(backgrounds)
    rows = [
        " ".join(word for word, _ in cells[n : n + across : len(backgrounds)]) for n in range(0, len(cells), across)
    ]
    pictures = sampler([prompt(*cell) for cell in cells], seed=7)
    return labelled_grid(
        pictures, [row.replace(" ", "\n") for row in rows], list(backgrounds) * 4, [False] * len(cells)
    )


def evaluate(folder: Path, count: int, steps: int) -> dict:
    """Writes evaluation.json, samples.png and objects.png into an exported folder. Returns the measures."""
    sampler, judge = Sampler(load(folder), steps), load_judge(folder / "judge")
    measures = measure(sampler, judge, count) | {"weights, MB": megabytes(folder)}
    (folder / "evaluation.json").write_text(json.dumps(measures, indent=2) + "\n", encoding="utf8")
    sample_grid(sampler).save(folder / "samples.png", optimize=True)
    object_grid(sampler).save(folder / "objects.png", optimize=True)
    return measures
