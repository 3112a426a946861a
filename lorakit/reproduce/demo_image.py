"""Run the image demo: a style, a subject and a slider, trained on the embedded pipeline by the product's own functions;
then stacked, merged, exported, measured, and drawn as one labelled picture.

style     24 pictures of 24 objects in two colours, as no picture of the base has them; measured on the other 24
subject   6 pictures of an animal that the base has never seen, as "a kin animal" (DreamBooth, Ruiz et al. 2023), and
          "an animal" as the base draws it, so that the class stays what it was (prior preservation)
slider    small to large, from prompts alone (Gandikota et al. 2023)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bases.load import EMBEDDED
from ..errors import StoppedError
from ..formats.inside import DIFFUSERS_FILE

if TYPE_CHECKING:
    from .image_measures import Studio

PICTURES = "lorakit-demo-pictures"  # the training pictures, in the demo's folder
STYLE = "duotone"
ALONE = "subject-alone"  # the subject without prior preservation
COMMON: dict[str, Any] = {
    "task": "text_to_image",
    "model": EMBEDDED,
    "targets": "locon",
    "batch_size": 8,
    "precision": "fp32",
    "sample_steps": 0,
    "sample_guidance": 3.0,
    "save_as": "diffusers",
}
STYLE_SETTINGS: dict[str, Any] = {"rank": 8, "alpha": 8, "steps": 150, "learning_rate": 1e-3}
SUBJECT_SETTINGS: dict[str, Any] = {"rank": 8, "alpha": 8, "steps": 300, "learning_rate": 1e-3}
SLIDER_SETTINGS: dict[str, Any] = {
    "rank": 8,
    "alpha": 8,
    "steps": 100,
    "learning_rate": 2e-3,
    "batch_size": 4,
    "slider_strength": 6.0,
    "slider_steps": 6,
    "data": "none",
    "slider_positive": "a large animal",
    "slider_negative": "a small animal",
    "slider_target": "an animal",
}
PRIOR_PICTURES, FEW_PRIOR_PICTURES, FEW_SAMPLING_STEPS = 64, 2, 2


@dataclass(frozen=True)
class Trained:
    """A trained adapter. `files`: by the format's name. `seconds`: of its training."""

    name: str
    files: dict[str, str]
    seconds: float


@dataclass(frozen=True)
class ImageOutcome:
    """The demo's results.

    figures: what `image_measures.measure` returns. merged_difference: the largest difference of a pixel, of 255,
    between pictures of the merged pipeline and of base plus adapters.
    """

    adapters: list[Trained]
    figures: dict[str, Any]
    merged: str
    merged_difference: int
    picture: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(
    out: Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    compare: bool = False,
    few: bool = False,
    say: Callable[[str], None] = print,
    console: Any = None,
) -> ImageOutcome:
    """Run the demo in the folder `out`, resuming an interrupted one.

    seed: of the training pictures, the training and the samples. steps: of each training, instead of its own. compare:
    also train the subject without prior preservation. few: only a few pictures in a few sampling steps, to try the
    whole quickly. say: prints a line. Raises
    StoppedError if training is interrupted.
    """
    from ..adapter.adapter import Adapter
    from ..bases.load_pipeline import embedded_pipeline
    from .emoji.judge import load_judge
    from .emoji.styles import STYLES
    from .image_data import RARE, SUBJECT, class_prompt, write_style, write_subject
    from .image_figure import draw_figure
    from .image_measures import STACK, STEPS, Studio, measure

    began = time.perf_counter()
    folders = {name: out / PICTURES / name for name in ("style", "subject")}
    write_style(folders["style"], STYLES[STYLE], seed)
    write_subject(folders["subject"], seed)

    def trained(name: str, settings: dict[str, Any]) -> Trained:
        return _train(out, name, settings | {"seed": seed} | ({"steps": steps} if steps else {}), console)

    say("1. style: 24 pictures in two colours, of 24 objects")
    style = trained("style", STYLE_SETTINGS | {"data": str(folders["style"])})
    say(f"2. subject: 6 pictures of a {SUBJECT}, as 'a {RARE} animal', and animals that the base draws")
    prior = {"prior_caption": class_prompt(), "prior_count": FEW_PRIOR_PICTURES if few else PRIOR_PICTURES}
    own = SUBJECT_SETTINGS | {"data": str(folders["subject"])}
    adapters = [style, trained("subject", own | prior)]
    if compare:
        adapters.append(trained(ALONE, own))
    say("3. slider: from 'a small animal' to 'a large animal', without pictures")
    adapters.append(trained("slider", SLIDER_SETTINGS))

    say("4. measure: style, subject, class and size, with a judge of 72 objects")
    base = embedded_pipeline()
    studio = Studio.open(base, FEW_SAMPLING_STEPS if few else STEPS)
    for adapter in adapters:
        studio.attach(adapter.name, Adapter.load(adapter.files["diffusers"]))
    figures = measure(studio, load_judge(base / "judge"), STYLES[STYLE], seed, few)

    say("5. merge subject and style into one pipeline, and compare its pictures")
    merged, difference = _merge(out / "merged", studio, {a.name: a for a in adapters}, STACK, seed)

    say("6. draw")
    picture = draw_figure(studio, seed, out / "demo.png")
    return ImageOutcome(adapters, figures, str(merged), difference, str(picture), time.perf_counter() - began)


def _train(out: Path, name: str, settings: dict[str, Any], console: Any) -> Trained:
    """Train an adapter by `lorakit image train`'s function. Raises StoppedError if a signal stopped it."""
    from ..train.config import TrainConfig
    from ..train.progress import Progress
    from ..train.train import train

    config = TrainConfig(**COMMON | settings | {"out": str(out / name)})
    config = config.replace(eval_every=config.steps)
    result = train(config, Progress(console))
    if result.adapter is None:
        raise StoppedError(
            f"stopped by {result.stopped} after step {result.step} of '{name}'\n"
            "  run lorakit demo --image again to resume",
            result.stopped or "",
        )
    return _exported(out, name, result.adapter / DIFFUSERS_FILE, result.seconds)


def _exported(out: Path, name: str, file: Path, seconds: float) -> Trained:
    """Write a trained adapter for A1111 and ComfyUI too, and check the file with independent code."""
    from ..adapter.adapter import Adapter
    from ..export.export import export

    kohya = out / "kohya" / f"{name}.safetensors"
    export(Adapter.load(file), kohya, "a1111", fix=True, verify=True, force=True)
    return Trained(name, {"diffusers": str(file), "kohya": str(kohya)}, seconds)


def _merge(
    out: Path, studio: Studio, adapters: dict[str, Trained], weights: dict[str, float], seed: int
) -> tuple[Path, int]:
    """Merge adapters into the pipeline's files. Returns the folder, and the largest difference of a pixel, of 255,
    between its pictures and those of the base with the adapters attached.
    """
    import numpy as np
    import torch

    from ..bases.load_pipeline import embedded_pipeline
    from ..checkpoint import merge_checkpoint
    from .image_data import SCENES, subject_prompt
    from .image_measures import Studio

    sources = [adapters[name].files["diffusers"] for name in weights]
    # In float32, so that the pictures' difference is not dominated by the rounding of the merged weights.
    merge_checkpoint(embedded_pipeline(), sources, out, weights=list(weights.values()), force=True, dtype=torch.float32)
    prompts = [subject_prompt(scene) for scene in SCENES]
    drawn = [s.draw(prompts, w, seed + 400) for s, w in ((studio, weights), (Studio.open(out, studio.steps), None))]
    one, other = (np.stack([np.asarray(picture, np.int16) for picture in pictures]) for pictures in drawn)
    return out, int(np.abs(one - other).max())
