"""Load a pipeline with its adapters, and write pictures with how they were made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import AdapterError, DataError
from ...generate.pictures.png_text import Lora, Parameters, png_text
from ...io.atomic import replacing
from .request import AdapterUse

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ...adapter.adapter import Adapter
    from ...model.state import Weights


@dataclass(frozen=True)
class Loaded:
    """A pipeline with adapters attached, none of them active. `name`: the model's, as written into pictures; `hash`:
    `identity.model_hash`; `loras`: how each adapter is used; `about`: a line on each; `device`, `precision`: in words.
    """

    pipe: Any
    name: str
    hash: str
    source: str | None
    loras: Mapping[str, Lora]
    about: Mapping[str, str]
    device: torch.device
    precision: str


def uses_of(given: Sequence[AdapterUse], made: Parameters | None) -> list[AdapterUse]:
    """Join the adapters given and those of a picture that is made again: what is not given is as it was made.

    An adapter of the picture without a path is left out: `identity.differences` names it.
    """
    if made is None:
        return [replace(use, weight=1.0 if use.weight is None else use.weight) for use in given]
    from ...generate.pictures.identity import lora_hash

    joined = []
    before = dict(made.loras)
    for use in given:
        name = use.name
        if name not in before:  # another name for the same file
            digest = lora_hash(use.source)
            name = next((n for n, lora in before.items() if digest and lora.hash == digest), name)
        lora = before.pop(name, Lora())
        if use.weight is None and not use.parts:
            use = replace(use, weight=lora.weight, parts=dict(lora.parts))
        joined.append(replace(use, name=name, weight=1.0 if use.weight is None else use.weight))
    for name, lora in before.items():
        if lora.source is not None:
            joined.append(AdapterUse(name, lora.source, lora.weight, dict(lora.parts)))
    order = [*made.loras, *(use.name for use in joined)]
    return sorted(joined, key=lambda use: order.index(use.name))


def load(
    model: str,
    uses: Sequence[AdapterUse],
    precision: str,
    force_base: bool,
    made: Parameters | None = None,
    path: Path | None = None,
) -> Loaded:
    """Load a pipeline, and attach the adapters. `made`: of the picture `path` that is made again.

    Raises LorakitError; AdapterError for an adapter that is not for pictures, DataError if the model or an adapter is
    not the one that `made` was made with; `force_base`: go on with another.
    """
    from ...adapter.adapter import Adapter
    from ...bases.device import choose_device, choose_dtype
    from ...bases.load_pipeline import load_pipeline
    from ...generate.pictures.generate import scaled_weights
    from ...generate.pictures.identity import lora_hash, model_hash, model_name, precision_name, public_source
    from ...model.activate import activate
    from ...model.attach import attach
    from ..shared.files import say_if_unfinished
    from ..shared.quiet import quiet_libraries

    read: dict[str, Adapter] = {}
    for use in uses:  # before the pipeline, to fail early
        say_if_unfinished(use.source)
        read[use.name] = Adapter.load(use.source)
        check_for_pictures(use.source, read[use.name])
    device = choose_device().value
    dtype = choose_dtype(precision, device).value
    with quiet_libraries():
        pipe = load_pipeline(model, dtype, device)
    digest = model_hash(pipe, model)
    name = model_name(model)
    loras = {
        use.name: Lora(use.weight or 0.0, use.parts, lora_hash(use.source), public_source(use.source)) for use in uses
    }
    if made is not None:
        _check_same(made, str(path), name, digest, loras, force_base)
    for use in uses:
        attach(pipe, read[use.name], use.name, force=force_base, activate=False)
        activate(pipe, scaled_weights(pipe, {use.name: dict(use.parts) or 1.0}, 1.0))  # names an unknown part
        activate(pipe, None)
    about = {use.name: about_adapter(read[use.name], loras[use.name]) for use in uses}
    return Loaded(pipe, name, digest, public_source(model), loras, about, device, precision_name(dtype))


def check_for_pictures(source: str, adapter: Adapter) -> None:
    """Raise AdapterError if an adapter is not for a pipeline: its modules are in no component."""
    from ...bases.pipeline import component_of

    names = [*adapter.updates, *adapter.saved]
    if names and not any(map(component_of, names)):
        raise AdapterError(
            f"{source} is no adapter for pictures: it changes '{names[0]}', which is in no component of a pipeline\n"
            f"  for text: lorakit generate 'your prompt' --adapter {source}"
        )


def about_adapter(adapter: Adapter, lora: Lora) -> str:
    """Return a line on an adapter: its weights, its size and its trigger words."""
    from ...analysis.training_notes import training
    from ...generate.pictures.png_text import number

    parts = "".join(f", {part} {number(factor)}" for part, factor in lora.parts.items())
    size = [f"rank {adapter.rank}"] if adapter.rank else []
    size += [f"{len(adapter.updates)} modules"] if adapter.updates else []
    count = len(adapter.embeddings)
    size += [f"{count} textual-inversion embedding{'s' if count > 1 else ''}"] if count else []
    triggers = training(adapter.metadata.get("header")).get("trigger words", [])
    triggers += [token for token in adapter.embeddings if token not in triggers]
    said = f"; trigger: {', '.join(triggers[:4])}" if triggers else ""
    return f"{number(lora.weight)}{parts} ({', '.join(size)}){said}"


def weights_of(pipe: Any, loras: Mapping[str, Lora], scale: float) -> dict[str, Weights]:
    """Return adapters' weights as `activate` takes them. `scale`: multiplies them."""
    from ...generate.pictures.generate import scaled_weights

    weights: dict[str, Weights] = {}
    for name, lora in loras.items():
        weights |= scaled_weights(pipe, {name: dict(lora.parts) or 1.0}, lora.weight * scale)
    return weights


def _check_same(
    made: Parameters, path: str, model: str, digest: str, loras: Mapping[str, Lora], force_base: bool
) -> None:
    """Raise DataError if a picture cannot be made again with this pipeline and these adapters; with `force_base` a
    notice instead.
    """
    from ...generate.pictures.identity import differences
    from ..shared.starting import notice

    lines = differences(made, model, digest, loras)
    if not lines:
        return
    text = "".join(f"\n  {line}" for line in lines)
    if not force_base:
        raise DataError(f"{path} cannot be made again:{text}\n  --force-base goes on with what is here")
    notice(f"lorakit: {path} will not be the same:{text}")


class Numbered:
    """Names for files in a folder that are never taken: 0001-a-panda-7.png, numbered on from what is there."""

    def __init__(self, folder: Path):
        self.folder = folder
        existing = [re.match(r"(\d{4,})-", path.name) for path in folder.iterdir()] if folder.is_dir() else []
        self.next = 1 + max((int(match[1]) for match in existing if match), default=0)

    def path(self, words: str) -> Path:
        """Return the next free name. `words`: a prompt, of which the beginning is used."""
        slug = re.sub(r"[^a-z0-9]+", "-", words.lower())[:40].strip("-") or "picture"
        number, self.next = self.next, self.next + 1
        return self.folder / f"{number:04d}-{slug}.png"


def write(path: Path, picture: Image.Image, parameters: Parameters | None = None) -> None:
    """Write a PNG atomically, with its parameters as text."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=None if parameters is None else png_text(parameters))
