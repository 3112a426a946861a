"""What a picture was made from, as text in its PNG: the "parameters" of A1111 (AUTOMATIC1111's stable-diffusion-webui).

    a panda in a meadow <lora:ink:0.7>
    Negative prompt: a house
    Steps: 20, Sampler: DDIM, CFG scale: 3, Seed: 7, Size: 32x32, Model hash: 52cb1234a0, Model: tiny-diffusion,
    Lora hashes: "ink: 6f0b9b0c2e1d", Version: lorakit 0.1.0        (one line in the file)

A value with a comma, a colon or a newline is a JSON string. `<lora:NAME:WEIGHT>` has one weight, `<lora:NAME:TE:UNET>`
one for the text encoders and one for the denoiser. A Lora's hash is CivitAI's AutoV3 (`formats.kohya_metadata`).

Fields of ours, which other programs show and ignore: "Prompt" and "Negative" where the lines above cannot hold the
text exactly, "Lora weights" where the tags cannot, "Lora sources" and "Model source" (a hub id or a relative path, as
given), "Precision", "Arguments" of the pipeline's call, "Libraries".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...errors import DataError, not_the_file

KEYWORD = "parameters"
NEGATIVE = "Negative prompt:"
_FIELD = re.compile(r'\s*(\w[\w \-/]{0,60}?)\s*:\s*("(?:[^"\\]|\\.)*"|[^,]*)\s*(?:,|$)')
_TAG = re.compile(r"<lora:([^:<>]+)((?::[^:<>]*)*)>")
_SIZE = re.compile(r"(\d+)x(\d+)")
_PLAIN = re.compile(r'[^\s",:][^",:\n]*(?<!\s)')  # a value that needs no quotes


@dataclass(frozen=True)
class Lora:
    """An adapter's use. `weight`: of the adapter; `parts`: further factors, by the start of module names ("unet",
    "text_encoder", "unet.mid_block"), the longest one that fits; `hash`: AutoV3; `source`: a hub id or relative path.
    """

    weight: float = 1.0
    parts: Mapping[str, float] = field(default_factory=dict)
    hash: str | None = None
    source: str | None = None

    def weight_of(self, part: str) -> float:
        """Return the weight of a component, such as "unet"."""
        return self.weight * self.parts.get(part, 1.0)


@dataclass(frozen=True)
class Parameters:
    """Generation parameters of one picture. None: not known. `sampler`, `schedule`: as in `schedulers.name_of`;
    `model`, `model_hash`: see `model_hash`; `arguments`: further ones of the pipeline's call; `version`: the program;
    `others`: fields of other programs.
    """

    prompt: str
    negative: str = ""
    steps: int | None = None
    sampler: str | None = None
    schedule: str | None = None
    guidance: float | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    model: str | None = None
    model_hash: str | None = None
    model_source: str | None = None
    loras: Mapping[str, Lora] = field(default_factory=dict)
    precision: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    libraries: str | None = None
    version: str | None = None
    others: Mapping[str, str] = field(default_factory=dict)


def to_text(parameters: Parameters) -> str:
    """Return A1111's text."""
    p = parameters
    tags = "".join(f" {_tag(name, lora)}" for name, lora in p.loras.items())
    negative = f"\n{NEGATIVE} {p.negative}" if p.negative else ""
    hashes = [f"{name}: {lora.hash}" for name, lora in p.loras.items() if lora.hash]
    sources = {name: lora.source for name, lora in p.loras.items() if lora.source}
    weights = {name: dict(lora.parts, weight=lora.weight) for name, lora in p.loras.items()}
    text = f"{p.prompt}{tags}{negative}\n"
    # What a reader of the lines above gets.
    prompt, without, loras = _prompts(f"{text}Steps".strip().split("\n")[:-1])
    inexact = list(loras) != list(p.loras) or any(
        loras[n] != replace(lora, hash=None, source=None) for n, lora in p.loras.items()
    )
    fields = {
        "Steps": p.steps,
        "Sampler": p.sampler,
        "Schedule type": p.schedule,
        "CFG scale": None if p.guidance is None else number(p.guidance),
        "Seed": p.seed,
        "Size": None if p.width is None or p.height is None else f"{p.width}x{p.height}",
        "Model hash": p.model_hash,
        "Model": p.model,
        "RNG": "CPU",  # where the noise is drawn, so that it is the same on every device
        "Lora hashes": ", ".join(hashes),
        "Lora weights": json.dumps(weights) if inexact else None,
        "Lora sources": json.dumps(sources) if sources else None,
        "Model source": p.model_source,
        "Precision": p.precision,
        "Arguments": json.dumps(p.arguments) if p.arguments else None,
        "Libraries": p.libraries,
        "Prompt": json.dumps(p.prompt) if prompt != p.prompt else None,
        "Negative": json.dumps(p.negative) if without != p.negative else None,
        **p.others,
        "Version": p.version,
    }
    return text + ", ".join(
        f"{name}: {_quoted(str(value))}" for name, value in fields.items() if value not in (None, "")
    )


def from_text(text: str, where: str = "the text") -> Parameters:
    """Parse A1111's text, ours or another program's. Raises DataError naming `where` if it is no such text."""
    *lines, last = text.strip().split("\n")
    fields = _fields(last)
    if "Steps" not in fields:
        raise DataError(
            f"{where} holds no generation parameters as A1111 writes them: its last line has no 'Steps: ...'\n"
            f"  it is: {last[:100]}"
        )
    prompt, negative, loras = _prompts(lines)
    prompt, negative = _json(fields, "Prompt", where, prompt), _json(fields, "Negative", where, negative)
    pairs = re.findall(r"([^,:]+): *([^,]*)", fields.pop("Lora hashes", ""))
    hashes = {name.strip(): value.strip() or None for name, value in pairs}
    sources = _json(fields, "Lora sources", where, {})
    if "Lora weights" in fields:
        loras = {n: _weighted(own, where) for n, own in _json(fields, "Lora weights", where, {}).items()}
    loras = {name: replace(lora, hash=hashes.get(name), source=sources.get(name)) for name, lora in loras.items()}
    size = _SIZE.fullmatch(fields.pop("Size", ""))
    if "Clip skip" in fields:  # A1111 counts from the last layer as 1, diffusers from the one before it
        skipped = (_whole(fields, "Clip skip", where) or 1) - 1
        fields["Arguments"] = json.dumps({"clip_skip": skipped}) if skipped > 0 else "{}"
    arguments = _json(fields, "Arguments", where, {})
    fields.pop("RNG", None)
    return Parameters(
        prompt=prompt,
        negative=negative,
        steps=_whole(fields, "Steps", where),
        sampler=fields.pop("Sampler", None),
        schedule=fields.pop("Schedule type", None),
        guidance=_numeric(fields, "CFG scale", where),
        seed=_whole(fields, "Seed", where),
        width=int(size[1]) if size else None,
        height=int(size[2]) if size else None,
        model=fields.pop("Model", None),
        model_hash=fields.pop("Model hash", None),
        model_source=fields.pop("Model source", None),
        loras=loras,
        precision=fields.pop("Precision", None),
        arguments=arguments,
        libraries=fields.pop("Libraries", None),
        version=fields.pop("Version", None),
        others=fields,
    )


def read_png(path: Path) -> Parameters:
    """Read the generation parameters of a PNG. Raises DataError if there is no such file, or none in it."""
    from PIL import Image

    if not path.is_file():
        raise DataError(f"there is no file {path}\n  expected a PNG that lorakit or A1111 has made")
    try:
        with Image.open(path) as image:
            image.load()  # text may follow the pixels
            chunks, format = dict(getattr(image, "text", {})), image.format
    except (OSError, ValueError, SyntaxError) as error:  # PIL's, for a damaged file
        raise DataError(f"cannot read {path}: {not_the_file(path) or str(error).rstrip('.')}") from error
    if KEYWORD in chunks:
        return from_text(chunks[KEYWORD], str(path))
    if format != "PNG":
        raise DataError(f"{path} is a {format} picture; expected the PNG itself, which holds the parameters as text")
    comfy = "workflow" in chunks or "prompt" in chunks
    raise DataError(
        f"{path} holds "
        + ("a workflow of ComfyUI, which only ComfyUI can run" if comfy else "no generation parameters")
        + "\n  expected one picture, no grid, of lorakit or A1111, as a PNG that no program has edited or resent"
    )


def png_text(parameters: Parameters) -> Any:
    """Return the text for `Image.save(..., pnginfo=...)`."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(KEYWORD, to_text(parameters))
    return info


def number(value: float) -> str:
    """Return the shortest text that is read as this number: 3.0 is "3"."""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))


def _tag(name: str, lora: Lora) -> str:
    components = {part: factor for part, factor in lora.parts.items() if "." not in part}
    if not components:
        return f"<lora:{name}:{number(lora.weight)}>"
    encoder = next((p for p in components if p.startswith("text_encoder")), "text_encoder")
    denoiser = next((p for p in components if not p.startswith("text_encoder")), "unet")
    return f"<lora:{name}:{number(lora.weight_of(encoder))}:{number(lora.weight_of(denoiser))}>"


def _prompts(lines: list[str]) -> tuple[str, str, dict[str, Lora]]:
    """Parse the lines above the fields: (prompt without tags, negative prompt, {name: Lora})."""
    start = next((n for n, line in enumerate(lines) if line.strip().startswith(NEGATIVE)), len(lines))
    prompt = "\n".join(line.strip() for line in lines[:start])
    negative = "\n".join(line.strip() for line in lines[start:]).removeprefix(NEGATIVE).strip()
    loras = {match[1]: _lora(match[2]) for match in _TAG.finditer(prompt)}
    return re.sub(rf" ?{_TAG.pattern}", "", prompt), negative, loras


def _lora(arguments: str) -> Lora:
    """Parse what follows the name in a tag: ":0.7", ":TE:UNET", ":te=0:unet=0.7", or nothing."""
    values: dict[str, float] = {}
    for n, argument in enumerate(part for part in arguments.split(":") if part):
        key, sep, text = argument.partition("=")
        name = key if sep else ("te", "unet", "dyn")[min(n, 2)]
        try:
            values[name] = float(text if sep else argument)
        except ValueError:
            continue  # a weight that is no number counts as 1 in A1111, too
    encoder = values.get("te", 1.0)
    denoiser = values.get("unet", encoder)
    return Lora(encoder) if encoder == denoiser else Lora(1.0, {"text_encoder": encoder, "unet": denoiser})


def _fields(line: str) -> dict[str, str]:
    """Parse `name: value, name: value`. What is no field is skipped up to the next comma."""
    fields: dict[str, str] = {}
    at = 0
    while at < len(line):
        match = _FIELD.match(line, at)
        if match is None:
            at = line.find(",", at) + 1 or len(line)
            continue
        fields[match[1]] = _unquoted(match[2].strip())
        at = match.end()
    return fields


def _quoted(value: str) -> str:
    return value if _PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)


def _unquoted(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def _json(fields: dict[str, str], name: str, where: str, default: Any) -> Any:
    """Take a field of ours that holds JSON of the default's type. Raises DataError if it holds something else."""
    if name not in fields:
        return default
    text = fields.pop(name)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, type(default)):
        raise DataError(f"{where}: the field '{name}' is damaged: {text[:80]}")
    return value


def _weighted(values: Any, where: str) -> Lora:
    """Parse {"weight": 0.7, "unet.mid_block": 0.5}."""
    if not isinstance(values, dict) or not all(
        isinstance(v, int | float) and math.isfinite(v) for v in values.values()
    ):
        raise DataError(f"{where}: the field 'Lora weights' is damaged: {str(values)[:80]}")
    parts = {name: float(value) for name, value in values.items()}
    return Lora(parts.pop("weight", 1.0), parts)


def _numeric(fields: dict[str, str], name: str, where: str) -> float | None:
    """Take a field that is a number. Raises DataError for anything else, also NaN and infinity."""
    text = fields.pop(name, None)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where}: '{name}: {text}' is not a number")
    return value


def _whole(fields: dict[str, str], name: str, where: str) -> int | None:
    """Take a field that is a whole number of any size. Raises DataError for anything else."""
    text = fields.pop(name, None)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise DataError(f"{where}: '{name}: {text}' is not a whole number") from None
