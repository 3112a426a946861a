"""The image demo's figures: how far a style, a subject and a slider reach, and what they leave as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .emoji.captions import prompt
from .emoji.measures import kinds_of_animals, object_areas, pixels, share_named, style_distance
from .image_data import SCENES, SUBJECT, class_prompt, draw_real, style_objects, subject_prompt

if TYPE_CHECKING:
    from PIL.Image import Image

    from .emoji.judge import Judge

STEPS, GUIDANCE, BATCH = 20, 3.0, 32  # of sampling
SCALES = (0.0, 0.5, 1.0)
SLIDE = (-2.0, -1.0, 0.0, 1.0, 2.0)
STACK = {"subject": 1.0, "style": 0.7}
SIZED = (
    "panda",
    "cat",
    "owl",
    "strawberry",
    "pizza",
    "rocket",
    "house",
    "ball",
)  # objects that are made small or large
PLAIN = ("red", "blue")  # object_areas needs plain backgrounds
CLASS_SAMPLES = 32

Weights = dict[str, float] | None


@dataclass
class Studio:
    """The pipeline with the demo's adapters. `steps`: of sampling."""

    pipe: Any
    names: list[str]
    steps: int = STEPS

    @classmethod
    def open(cls, name: str | Path, steps: int = STEPS) -> Studio:
        """Load a pipeline, without adapters, in float32."""
        import torch

        from ..bases.device import choose_device
        from ..bases.load_pipeline import load_pipeline

        return cls(load_pipeline(str(name), torch.float32, choose_device().value), [], steps)

    def attach(self, name: str, adapter: Any) -> None:
        from ..model.attach import attach

        attach(self.pipe, adapter, name=name)
        self.names.append(name)

    def draw(self, prompts: Sequence[str], weights: Weights, seed: int) -> list[Image]:
        """Return a picture for each prompt, with seeds from `seed` on. `weights`: None for the base."""
        from ..generate.pictures.generate import generate_pictures

        seeds = [seed + number for number in range(len(prompts))]
        return generate_pictures(
            self.pipe,
            prompts,
            seed=seeds,
            steps=self.steps,
            guidance=GUIDANCE,
            weights=[weights] * len(prompts),
            batch_size=BATCH,
        )


def measure(
    studio: Studio, judge: Judge, style: Callable[[Tensor], Tensor], seed: int, few: bool = False
) -> dict[str, Any]:
    """Return all figures, as `--json` prints them: "style", "subject", "slider" and "stacked", shares in 0..1.

    studio: with the adapters "style", "subject" and "slider", and "subject-alone" if that is to be measured too.
    few: on a few pictures only.
    """
    return {
        "style": _style(studio, judge, style, seed, few),
        "subject": _subject(studio, judge, seed, few),
        "slider": _slider(studio, judge, seed, few),
        "stacked": _stacked(studio, judge, style, seed, few),
    }


def _style(studio: Studio, judge: Judge, style: Callable[[Tensor], Tensor], seed: int, few: bool) -> dict[str, Any]:
    """Distance to the style and recognized objects at each scale, on objects that the LoRA has not seen."""
    pairs = [(thing, scene) for scene in ("meadow", "desert") for thing in style_objects()[1]][: 2 if few else None]
    things = [thing for thing, _ in pairs]
    real = style(draw_real(things, [scene for _, scene in pairs], seed + 1))
    distance, objects = {}, {}
    for scale in SCALES:
        drawn = pixels(studio.draw([prompt(*pair) for pair in pairs], {"style": scale} if scale else None, seed + 100))
        distance[f"{scale:g}"] = style_distance(drawn, real)
        objects[f"{scale:g}"] = share_named(judge, drawn, things)
    return {
        "distance": distance,
        "distance_left": distance["1"] / distance["0"],
        "objects": objects,
        "objects_of_drawn_pictures": share_named(judge, real, things),
        "samples": len(pairs),
    }


def _subject(studio: Studio, judge: Judge, seed: int, few: bool) -> dict[str, Any]:
    """How often the subject is recognized, and which animals "an animal" still gives."""
    count = 2 if few else CLASS_SAMPLES
    scenes = [SCENES[number % len(SCENES)] for number in range(count)]
    subject, animal = [subject_prompt(scene) for scene in scenes], [class_prompt(scene) for scene in scenes]
    asked = [SUBJECT] * count

    def kinds(weights: Weights) -> list[str]:
        return kinds_of_animals(judge, pixels(studio.draw(animal, weights, seed + 200)))

    return {
        "recognized": {
            name: share_named(judge, pixels(studio.draw(subject, weights, seed + 200)), asked)
            for name, weights in (("base", None), ("subject", {"subject": 1.0}))
        },
        "kinds_of_animals": {
            "base": kinds(None),
            "with prior": kinds({"subject": 1.0}),
            "without prior": kinds({"subject-alone": 1.0}) if "subject-alone" in studio.names else None,
        },
        "samples": count,
    }


def _slider(studio: Studio, judge: Judge, seed: int, few: bool) -> dict[str, Any]:
    """The share of the picture that the object covers, at each scale."""
    pairs = [(thing, background) for thing in SIZED for background in PLAIN][: 2 if few else None]
    areas, objects = {}, {}
    for scale in SLIDE:
        weights = {"slider": scale} if scale else None
        drawn = pixels(studio.draw([prompt(*pair) for pair in pairs], weights, seed + 300))
        areas[f"{scale:g}"] = float(object_areas(drawn).mean())
        objects[f"{scale:g}"] = share_named(judge, drawn, [thing for thing, _ in pairs])
    return {"area": areas, "factor": areas["2"] / max(areas["-2"], 1e-6), "objects": objects, "samples": len(pairs)}


def _stacked(studio: Studio, judge: Judge, style: Callable[[Tensor], Tensor], seed: int, few: bool) -> dict[str, Any]:
    """The subject in the style."""
    scenes = [SCENES[number % len(SCENES)] for number in range(2 if few else 16)]
    drawn = pixels(studio.draw([subject_prompt(scene) for scene in scenes], dict(STACK), seed + 200))
    real = style(draw_real([SUBJECT] * len(scenes), scenes, seed + 1))
    return {
        "weights": dict(STACK),
        "recognized": share_named(judge, drawn, [SUBJECT] * len(scenes)),
        "distance": style_distance(drawn, real),
        "samples": len(scenes),
    }
