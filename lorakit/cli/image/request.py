"""What `lorakit image generate` was asked for: the texts of its options, checked before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ConfigError, DataError
from ..shared.starting import notice

# NAME=PATH:WEIGHT; a drive's letter, C:\, is no weight.
_ADAPTER = re.compile(r"(?:(?P<name>[^=:/\\]+)=)?(?P<source>.+?)(?::(?P<weight>[^:/\\]*))?")
_RESERVED = re.compile(r'[:,<>"\n]+')  # what A1111's text uses around a name
_TAG = re.compile(r"<lora:([^:>]+):?([^>]*)>")
# Names of files and folders that say nothing of what is in them: the folder around them does.
_GENERIC = {"adapter", "adapter_model", "pytorch_lora_weights", "lora", "model"}


@dataclass(frozen=True)
class AdapterUse:
    """An adapter as given. `weight`: None if it was not given; `parts`: further factors, see `png_text.Lora`."""

    name: str
    source: str
    weight: float | None = None
    parts: dict[str, float] = field(default_factory=dict)


def adapters(texts: Sequence[str]) -> list[AdapterUse]:
    """Parse `--adapter`: PATH, NAME=PATH, PATH:0.7, PATH:unet=0.7,text_encoder=0. ConfigError for anything else."""
    uses: list[AdapterUse] = []
    for text in texts:
        match = _ADAPTER.fullmatch(text)
        if match is None:
            raise ConfigError("--adapter: expected PATH or NAME=PATH, with :WEIGHT behind it if it is not 1")
        source, behind = match["source"], match["weight"]
        if behind is not None and Path(text.partition("=")[2] if match["name"] else text).expanduser().exists():
            source, behind = f"{source}:{behind}", None  # a path with a colon
        weight, parts = (None, {}) if behind is None else _weights(text, behind)
        name = _RESERVED.sub("_", match["name"] or _name_of(source)).strip()
        if any(use.name == name for use in uses):
            raise ConfigError(f"--adapter: two adapters are named '{name}'\n  give each its own: NAME=PATH")
        uses.append(AdapterUse(name, source, weight, parts))
    return uses


def _weights(text: str, behind: str) -> tuple[float | None, dict[str, float]]:
    """Parse what follows the path: a number, or PART=NUMBER,..., which may have a number first."""
    weight, parts = None, {}
    for each in behind.split(","):
        part, sep, value = each.rpartition("=")
        number = _number(value)
        if number is None or (not sep and weight is not None):
            raise ConfigError(
                f"--adapter {text}: '{each}' is no weight\n"
                "  expected a number, such as 0.7, or parts of the model with theirs: unet=0.7,text_encoder=0"
            )
        if sep:
            parts[part.strip()] = number
        else:
            weight = number
    return weight, parts


def _name_of(source: str) -> str:
    path = Path(source)
    names = [path.name.removesuffix(path.suffix) if path.suffix in (".safetensors", ".pt", ".bin") else path.name]
    names += [parent.name for parent in path.parents]
    return next((name for name in names if name and name.lower() not in _GENERIC), "adapter")


def scales(text: str | None) -> list[float]:
    """Parse `--scale 0,0.5,1`; no text is [1]. ConfigError for anything that is no list of numbers."""
    if text is None:
        return [1.0]
    numbers = [_number(part) for part in text.replace(",", " ").split()]
    if not numbers or None in numbers:
        bad = next((part for part in text.replace(",", " ").split() if _number(part) is None), text)
        raise ConfigError(f"--scale: '{bad}' is not a number\n  expected numbers such as --scale 0 0.5 1")
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"--scale {text}: a number is there twice")
    return [number for number in numbers if number is not None]


def axes(text: str | None) -> list[str]:
    """Parse `--grid scale,prompt`; "none" and no text are []."""
    return [] if text in (None, "none") else [axis.strip() for axis in str(text).split(",")]


def prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """Return the prompts of the arguments and of a file, one a line, each once (with a notice).

    Raises ConfigError for one with A1111's tags, DataError for a file that cannot be read.
    """
    found = list(given)
    if file is not None:
        try:
            lines = file.expanduser().read_text(encoding="utf8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"--prompts: cannot read {file}: {error}\n  expected a text file, one prompt a line"
            ) from error
        found += [line.strip() for line in lines if line.strip()]
        if not found:
            raise DataError(f"--prompts: {file} is empty\n  expected one prompt a line")
    for prompt in found:
        tag = _TAG.search(prompt)
        if tag is not None:
            weight = f":{tag[2]}" if tag[2] else ""
            raise ConfigError(
                f"the prompt has '{tag[0]}', which is no word\n  take it out, and give --adapter {tag[1]}=PATH{weight}"
            )
    different = list(dict.fromkeys(found))
    if len(different) < len(found):
        twice = next(prompt for prompt in different if found.count(prompt) > 1)
        notice(
            f"lorakit: {len(found) - len(different)} of {len(found)} prompts are there before, such as '{twice}', and "
            "are drawn once: --count draws a prompt with several seeds"
        )
    return different


def arguments(texts: Iterable[str]) -> dict[str, Any]:
    """Parse `--argument NAME=VALUE`, with YAML values. ConfigError for anything else."""
    import yaml

    found: dict[str, Any] = {}
    for text in texts:
        name, sep, value = text.partition("=")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            sep = ""
        if not sep or not name.strip():
            raise ConfigError(f"--argument {text}: expected NAME=VALUE, such as guidance_rescale=0.7")
    return found


def output_path(out: Path, force: bool) -> Path:
    """Return OUT with ~ expanded. ConfigError for a file that is no PNG, or that exists without `force`."""
    out = out.expanduser()
    if out.suffix.lower() in (".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"):
        raise ConfigError(
            f"{out}: pictures are written as PNG, which keeps every pixel and how it was made\n"
            f"  give a name that ends in .png, or a folder"
        )
    if is_png(out) and out.is_dir():
        raise ConfigError(f"{out} is a folder; a name that ends in .png is that of a picture\n  give another name")
    if is_png(out) and out.exists() and not force:
        raise ConfigError(f"{out} exists\n  --force replaces it")
    if not is_png(out) and out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; expected a folder, or a name that ends in .png")
    return out


def is_png(out: Path) -> bool:
    """Whether OUT is the name of one picture, not of a folder."""
    return out.suffix.lower() == ".png"


def spaced_scales(args: Sequence[str]) -> list[str]:
    """Join the numbers behind `--scale`, so that it may be written with spaces: --scale -1 0 1."""
    joined: list[str] = []
    args = list(args)
    while args:
        word = args.pop(0)
        joined.append(word)
        if word == "--scale" and args:
            numbers = [args.pop(0)]
            while args and _number(numbers[0].split(",")[0]) is not None and _number(args[0]) is not None:
                numbers.append(args.pop(0))
            joined.append(",".join(numbers))
    return joined


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) < 1e6 else None  # no NaN, no infinity
