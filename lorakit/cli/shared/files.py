"""What the verbs that write adapters share: reading with the options a file may need, and a place to write that loses nobody's work."""

from __future__ import annotations

import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from ...errors import AdapterError, ConfigError, did_you_mean

if TYPE_CHECKING:
    import torch

    from ...adapter.adapter import Adapter

_SUFFIXES = {"kohya": (".safetensors",), "diffusers": (".safetensors", ""), "cloneofsimo": (".safetensors", ".pt"), "gguf": (".gguf",),
             "loralib": (".pt", ".bin", ".pth", ".safetensors")}  # fmt: skip
_WEIGHTS = {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt"}


def read(source: str, alpha: float | None = None, base: Path | None = None, force_base: bool = False) -> Adapter:
    """An adapter; see `load_on`."""
    from ...checkpoint.residual import load_on, started_as

    adapter = load_on(source, base, alpha, force_base)
    start = started_as(source) if base is not None else None
    if start:
        print(f"{source} was started as {start}: made a plain LoRA of {base}, of twice the rank", file=sys.stderr)
    return adapter


def read_checked(source: str, alpha: float | None = None, base: Path | None = None) -> Adapter:
    """An adapter; where it holds NaN or infinity, the error says in which keys, all of them."""
    from ...analysis.inspect import not_finite

    try:
        return read(source, alpha, base)
    except AdapterError as error:
        bad = not_finite(source) if "not finite" in str(error) else {}
        if not bad:
            raise
        keys = "".join(f"\n  {key}: {count:,}" for key, count in list(bad.items())[:20])
        more = f"\n  and {len(bad) - 20} more keys" if len(bad) > 20 else ""
        raise AdapterError(f"{error}\n{len(bad)} keys of {source} hold such numbers:{keys}{more}") from error


def inspect_call(path: Path, adapter: Adapter, format: str, base: str | None) -> str:
    """How to look at what was written, with the options that reading it takes."""
    more = f" --base {quote(base)}" if base and format == "gguf" else ""
    if format == "loralib":
        from ...formats.loralib import alpha_of

        more = f" --alpha {alpha_of(adapter):g}"
    return f"lorakit inspect {quote(str(path))}{more}"


def base_folder(name: str | None) -> Path | None:
    """Where the base's files are: a folder as named, of whatever kind, or the embedded model's."""
    from ...bases.load import EMBEDDED, model_path

    if name is None:
        return None
    return Path(model_path(name)) if name == EMBEDDED else Path(name).expanduser()


def dtype_of(name: str | None) -> torch.dtype | None:
    import torch

    return None if name is None else {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def numbers(text: str | None) -> list[float] | None:
    """--weights 0.7,0.3"""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights: '{text}' is not a list of numbers; expected one for each adapter, e.g. 0.7,0.3") from None


def free(out: Path, to: str, force: bool) -> Path:
    """OUT, if it suits the format and there is nothing there, or only an older adapter of that format that may be replaced."""
    from ...formats import FOLDERS, FORMATS

    out = out.expanduser()
    if to not in FORMATS:
        raise ConfigError(f"--to {to}: no such format{did_you_mean(to, FORMATS)}\n  known: {', '.join(FORMATS)}")
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
        raise ConfigError(f"{out} is a file, and {to} is written as a folder")
    return out


def _check_folder(out: Path, to: str) -> None:
    """A folder may be written into if it holds an adapter of that format: PEFT's and MLX's files have names in common."""
    from ...formats import FOLDERS, find, format_of

    if to not in (*FOLDERS, "diffusers"):
        raise ConfigError(f"{out} is a folder, and {to} is written as a file")
    if (out / "config.json").exists():
        raise ConfigError(f"{out} holds a model (config.json), among whose files an adapter would not be found\n  name another folder")
    try:
        found = format_of(out) if find(out) == out else "something else"  # the adapter may lie deeper: in a run's folder, say
    except AdapterError:
        found = "something else"
    if found != to:
        raise ConfigError(f"{out} is a folder with {found if found in FOLDERS else 'other things'} in it\n  name another folder")
