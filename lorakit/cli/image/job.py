"""One call of `lorakit image generate`: which pictures it makes, with which settings, and what it writes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, LorakitWarning
from ...generate.pictures.call import defaults_of
from ...generate.pictures.generate import stream_pictures
from ...generate.pictures.grid import grid
from ...generate.pictures.identity import PROGRAM, libraries
from ...generate.pictures.png_text import Lora, Parameters, number
from ...generate.pictures.schedulers import choose_scheduler, name_of
from ...generate.pictures.sheet import Sheet, Value, sheet
from .drawing import Loaded, Numbered, weights_of, write
from .request import is_png

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Job:
    """`settings`: what all pictures share; `asked`: those of them that were given on the command line; `made`: the
    picture that is made again, if one is.
    """

    loaded: Loaded
    settings: Parameters
    sheet: Sheet
    asked: Mapping[str, Any]
    made: Parameters | None

    def lines(self) -> list[str]:
        """Say what is used, and which of it are defaults."""
        s, pipe = self.settings, self.loaded.pipe
        chosen = self.asked.keys() | ({f.name for f in fields(Parameters)} if self.made else set())
        said = {
            "steps": f"{s.steps} steps" if s.steps else "",
            "guidance": "" if s.guidance is None else f"guidance {number(s.guidance)}",
            "width": f"{s.width} x {s.height} pixels" if s.width else "",
            "sampler": " ".join(filter(None, (s.sampler, s.schedule))),
        }
        words = [f"{text}{'' if name in chosen else ' (default)'}" for name, text in said.items() if text]
        first = f"{self.loaded.name} ({type(pipe).__name__}): {', '.join(words)}; {s.precision} on {self.loaded.device}"
        return [first, *(f"{name} {about}" for name, about in self.loaded.about.items())]

    def draw(self, merged: bool, batch_size: int | None) -> Iterator[Image.Image]:
        """Return an iterator of the pictures. Raises at once what `stream_pictures` does for settings."""
        s, cells = self.settings, self.sheet.pictures
        return stream_pictures(
            self.loaded.pipe,
            [cell["prompt"] for cell in cells],
            seed=[cell["seed"] for cell in cells],
            weights=[weights_of(self.loaded.pipe, cell["adapter"], cell["scale"]) or None for cell in cells],
            steps=s.steps,
            guidance=s.guidance,
            negative=s.negative,
            width=s.width,
            height=s.height,
            merged=merged,
            batch_size=batch_size,
            **s.arguments,
        )

    def write(
        self, pictures: Iterable[Image.Image], out: Path, wants_grid: bool, say: Callable[[Any], None] | None
    ) -> Written:
        """Write each picture as soon as it is there, then the grid. `say`: prints a line for each."""
        several = len(self.sheet.pictures) > 1
        names = Numbered(out)
        written = Written()
        for cell, picture in zip(self.sheet.pictures, pictures):
            path = out if is_png(out) and not several else None if is_png(out) else names.path(_words(cell))
            parameters = self._parameters(cell, picture)
            if path is not None:
                write(path, picture, parameters)
                if say is not None:
                    say(path)
            written.add(path, picture, parameters)
        if several and (wants_grid or is_png(out)):
            written.grid = out if is_png(out) else names.path("grid")
            write(written.grid, self._grid(written.pictures))
            if say is not None:
                each = "   (--out FOLDER keeps each picture by itself too)" if is_png(out) else ""
                say(f"grid: {written.grid}{each}")
        return written

    def _parameters(self, cell: Mapping[str, Any], picture: Image.Image) -> Parameters:
        loras = {name: replace(lora, weight=lora.weight * cell["scale"]) for name, lora in cell["adapter"].items()}
        return replace(
            self.settings,
            prompt=cell["prompt"],
            seed=cell["seed"],
            width=picture.width,
            height=picture.height,
            loras={name: lora for name, lora in loras.items() if lora.weight},
        )

    def _grid(self, pictures: Sequence[Image.Image]) -> Image.Image:
        """Draw the grid: what all pictures have in common is its title and the line below."""
        left = iter(pictures)
        cells = [[None if cell is None else next(left) for cell in row] for row in self.sheet.cells]
        shown = {axis: {str(cell[axis]) for cell in self.sheet.pictures} for axis in ("prompt", "seed", "adapter")}
        first, s = self.sheet.pictures[0], self.settings
        common = [self.loaded.name]
        common += [f"{s.steps} steps"] if s.steps else []
        common += [] if s.guidance is None else [f"guidance {number(s.guidance)}"]
        common += [" ".join(filter(None, (s.sampler, s.schedule)))]
        common += [f"seed {first['seed']}"] if len(shown["seed"]) == 1 else []
        common += [_label(first["adapter"])] if len(shown["adapter"]) == 1 and first["adapter"] else []
        title = first["prompt"] if len(shown["prompt"]) == 1 else None
        return grid(cells, self.sheet.rows, self.sheet.columns, title, ", ".join(common))


@dataclass
class Written:
    """What was written, in order. `files`: None for a picture that is only in the grid."""

    files: list[Path | None] = field(default_factory=list)
    pictures: list[Image.Image] = field(default_factory=list)
    parameters: list[Parameters] = field(default_factory=list)
    grid: Path | None = None

    def add(self, file: Path | None, picture: Image.Image, parameters: Parameters) -> None:
        self.files.append(file)
        self.pictures.append(picture)
        self.parameters.append(parameters)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        pictures = [
            {
                "file": None if file is None else str(file),
                "prompt": p.prompt,
                "negative": p.negative,
                "seed": p.seed,
                "steps": p.steps,
                "guidance": p.guidance,
                "sampler": " ".join(filter(None, (p.sampler, p.schedule))),
                "width": p.width,
                "height": p.height,
                "model": p.model,
                "adapters": {name: {"weight": lora.weight, **lora.parts} for name, lora in p.loras.items()},
            }
            for file, p in zip(self.files, self.parameters)
        ]
        return {"pictures": pictures, "grid": None if self.grid is None else str(self.grid)}

    def compared_with(self, path: Path, made: Parameters) -> Comparison | None:
        """Compare the only picture with the PNG it was made from; None if that is not what was asked for."""
        import numpy as np
        from PIL import Image

        ours = self.parameters[0]
        if len(self.pictures) > 1 or not (made.version or "").startswith("lorakit"):
            return None
        changed = [
            f.name for f in fields(Parameters) if f.name not in _FREE and getattr(ours, f.name) != getattr(made, f.name)
        ]
        if changed:
            return Comparison(f"changed from {path}: {', '.join(changed)}", None, None)
        with Image.open(path.expanduser()) as image:
            before = np.asarray(image.convert("RGB")).astype(int)
        now = np.asarray(self.pictures[0]).astype(int)
        if before.shape != now.shape:
            return Comparison(f"{path} was edited after it was made: its size is another", None, None)
        difference = np.abs(before - now)
        count, largest = int((difference > 0).sum()), int(difference.max())
        if not count:
            return Comparison(f"the same pixels as {path}", 0, 0)
        libraries = f"; it was made with {made.libraries}" if made.libraries != ours.libraries else ""
        if largest == 1 and not libraries:
            libraries = " (rounding: it was made in one pass with others; --batch-size 1 makes each by itself)"
        return Comparison(
            f"{count:,} of {difference.size:,} values differ from {path}, by at most {largest} of 255{libraries}",
            count,
            largest,
        )


# What may differ without a picture being another one.
_FREE = ("width", "height", "loras", "model", "model_source", "libraries", "version", "others", "model_hash")


@dataclass(frozen=True)
class Comparison:
    """`values`: how many differ; `largest`: difference, of 255; None if they were not compared."""

    said: str
    values: int | None
    largest: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"compared": self.said, "different_values": self.values, "largest_difference": self.largest}


def plan(
    loaded: Loaded,
    asked: Mapping[str, Any],
    made: Parameters | None,
    prompts: Sequence[str],
    count: int,
    scales: Sequence[float],
    axes: Sequence[str],
) -> Job:
    """Settle what is not given: as in the picture that is made again, else the pipeline's defaults.

    Raises ConfigError for axes, a scheduler and settings that cannot be used.
    """
    if scales != [1.0] and not loaded.loras:
        raise ConfigError("--scale multiplies adapters' weights, and there is no adapter\n  give --adapter PATH")
    if "adapter" in axes and not loaded.loras:
        raise ConfigError("--grid adapter compares adapters, and there is none\n  give --adapter PATH")
    settings = _settled(loaded, asked, made or Parameters(""))
    first = settings.seed or 0
    together = dict(loaded.loras)
    adapters = [Value(together, _label(together))]
    if "adapter" in axes:
        alone = [Value({name: lora}, _label({name: lora})) for name, lora in together.items()]
        adapters = [Value({}, "base"), *alone, *(adapters if len(alone) > 1 else [])]
    values = {
        "adapter": adapters,
        "scale": [Value(scale, f"scale {number(scale)}") for scale in scales],
        "prompt": [Value(prompt, prompt) for prompt in prompts],
        "seed": [Value(seed, f"seed {seed}") for seed in range(first, first + count)],
    }
    return Job(loaded, settings, sheet(values, axes), asked, made)


def _settled(loaded: Loaded, asked: Mapping[str, Any], made: Parameters) -> Parameters:
    pipe = loaded.pipe
    own = defaults_of(pipe)
    defaults = {"steps": own.steps, "guidance": own.guidance, "width": own.width, "height": own.height}
    found: dict[str, Any] = {
        name: next((v for v in (asked.get(name), getattr(made, name), default) if v is not None), None)
        for name, default in {**defaults, "seed": 0, "negative": ""}.items()
    }
    if made.version is not None and not made.version.startswith("lorakit"):
        warnings.warn(
            f"the picture was made by another program ({made.version}), which draws its noise and weighs words such as "
            "(this:1.2) in its own way: expect a similar one",
            LorakitWarning,
            stacklevel=2,
        )
    if "sampler" in asked:
        pipe.scheduler = choose_scheduler(pipe.scheduler, asked["sampler"])
    elif made.sampler is not None:
        pipe.scheduler = choose_scheduler(pipe.scheduler, made.sampler, made.schedule)
    sampler, schedule = name_of(pipe.scheduler)
    return Parameters(
        "",
        **found,
        sampler=sampler,
        schedule=schedule,
        model=loaded.name,
        model_hash=loaded.hash,
        model_source=loaded.source,
        precision=loaded.precision,
        arguments={**made.arguments, **asked.get("arguments", {})},
        libraries=libraries(),
        version=PROGRAM,
    )


def _label(loras: Mapping[str, Lora]) -> str:
    """Name adapters, with weights other than 1."""
    words = []
    for name, lora in loras.items():
        weight = [number(lora.weight)] if lora.weight != 1 else []
        parts = ", ".join(f"{part} {number(factor)}" for part, factor in lora.parts.items())
        words.append(" ".join([name, *weight, *([f"({parts})"] if parts else [])]))
    return " + ".join(words) or "base"


def _words(cell: Mapping[str, Any]) -> str:
    return f"{cell['prompt'][:32]} {cell['seed']}"
