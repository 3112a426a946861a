"""Shared by the commands that read and write adapters: options for some formats, and protection of existing output."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from ...errors import AdapterError, ConfigError, did_you_mean
from .starting import notice

if TYPE_CHECKING:
    import torch

    from ...adapter.adapter import Adapter

_SUFFIXES = {
    "kohya": (".safetensors",),
    "diffusers": (".safetensors", ""),
    "comfyui": (".safetensors",),
    "cloneofsimo": (".safetensors", ".pt"),
    "gguf": (".gguf",),
    "loralib": (".pt", ".bin", ".pth", ".safetensors"),
}
_WEIGHTS = {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt"}


def read(
    source: str,
    alpha: float | None = None,
    base: Path | None = None,
    force_base: bool = False,
    model_type: str | None = None,
) -> Adapter:
    """Load an adapter (see `load_on`), with a note on stderr if PEFT's PiSSA, MiLoRA or OLoRA becomes a plain LoRA of
    `base`.
    """
    from ...checkpoint.residual import load_on, started_as

    say_if_unfinished(source)
    adapter = load_on(source, base, alpha, force_base, model_type)
    init = started_as(source) if base is not None else None
    if init:
        notice(f"{source} was initialized as {init}: converted to a plain LoRA of {base}, of twice the rank")
    return adapter


def say_if_unfinished(source: str) -> None:
    """Say on stderr which checkpoint is used, if the source is a run that has not ended."""
    from ...formats.inside import newest_checkpoint

    path = Path(source).expanduser()
    newest = newest_checkpoint(path) if path.is_dir() else None
    if newest is not None:
        notice(f"lorakit: {source} has not ended; using its newest checkpoint, {newest.name}")


def read_checked(
    source: str, alpha: float | None = None, base: Path | None = None, model_type: str | None = None
) -> Adapter:
    """Load an adapter; if it contains NaN or infinity, the AdapterError lists the affected keys."""
    from ...analysis.inspect import not_finite

    try:
        return read(source, alpha, base, model_type=model_type)
    except AdapterError as error:
        bad = not_finite(source) if "not finite" in str(error) else {}
        if not bad:
            raise
        keys = "".join(f"\n  {key}: {count:,}" for key, count in list(bad.items())[:20])
        more = f"\n  and {len(bad) - 20} more keys" if len(bad) > 20 else ""
        raise AdapterError(f"{error}\n{len(bad)} keys of {source} have non-finite elements:{keys}{more}") from error


def inspect_call(path: Path, adapter: Adapter, format: str, base: str | None) -> str:
    """Return the `lorakit inspect` command for a written adapter, with the options needed to read it."""
    options = f" --base {quote(base)}" if base and format == "gguf" else ""
    if format == "loralib":
        from ...formats.loralib import alpha_of

        options = f" --alpha {alpha_of(adapter):g}"
    return f"lorakit inspect {quote(str(path))}{options}"


def base_folder(name: str | None) -> Path | None:
    """Return the path of the base's files: the given folder or file, or the embedded model's folder for 'embedded'."""
    from ...bases.load import EMBEDDED, model_path

    if name is None:
        return None
    return Path(model_path(name)) if name == EMBEDDED else Path(name).expanduser()


def dtype_of(name: str | None) -> torch.dtype | None:
    """Return the dtype for 'bf16', 'fp16' or 'fp32'; None for None."""
    import torch

    return None if name is None else {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def parse_weights(text: str | None) -> list[float] | None:
    """Parse `--weights 0.7,0.3`. ConfigError for anything that is not a comma-separated list of numbers."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--weights: '{text}' is not a list of numbers; expected one per adapter, e.g. 0.7,0.3"
        ) from None


def output_path(out: Path, to: str, force: bool) -> Path:
    """Return OUT with ~ expanded. ConfigError if it does not suit the format `to`, or exists.

    With `force`, an existing file or an adapter of the same format may be replaced.
    """
    from ...formats import FOLDERS, FORMATS

    out = out.expanduser()
    if to not in FORMATS:
        raise ConfigError(f"--to {to}: no such format{did_you_mean(to, FORMATS)}\n  formats: {', '.join(FORMATS)}")
    if to in FOLDERS and out.suffix in _WEIGHTS:
        raise ConfigError(f"{out}: {to} is written as a folder\n  give a name without '{out.suffix}'")
    if to in _SUFFIXES and out.suffix not in _SUFFIXES[to] and not (to == "diffusers" and out.suffix not in _WEIGHTS):
        raise ConfigError(f"{out}: {to} is written as a file that ends in {' or '.join(s for s in _SUFFIXES[to] if s)}")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return out
    if not force:
        raise ConfigError(f"{out} exists\n  --force replaces it")
    if out.is_dir():
        _check_folder(out, to)
    elif to in FOLDERS:
        raise ConfigError(f"{out} is a file, but {to} is written as a folder")
    return out


def format_for(to: str | None, source: str, out: Path) -> str:
    """The format to write: `to`, or that of the source where OUT can be such a file or folder, or peft."""
    from ...formats import FOLDERS, format_of

    if to is not None:
        return to
    own = format_of(source)
    suits = not out.suffix if own in FOLDERS else out.suffix in _WEIGHTS and out.suffix in _SUFFIXES[own]
    return own if suits else "peft"


def _check_folder(out: Path, to: str) -> None:
    """Raise ConfigError unless the folder contains an adapter of this format: PEFT's and MLX's files share names."""
    from ...formats import FOLDERS, find, format_of

    if to not in (*FOLDERS, "diffusers"):
        raise ConfigError(f"{out} is a folder, but {to} is written as a file")
    if (out / "config.json").exists():
        raise ConfigError(
            f"{out} holds a model (config.json); expected a folder for the adapter alone\n  name another folder"
        )
    try:
        # The adapter may be in a subfolder, as in a run's folder.
        existing = format_of(out) if find(out) == out else "something else"
    except AdapterError:
        existing = "something else"
    if existing != to:
        content = f"an adapter in {existing}'s format" if existing in FOLDERS else "other files"
        raise ConfigError(f"{out} is a folder with {content}\n  name another folder")
