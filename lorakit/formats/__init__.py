"""Read and write adapters: one file for each format, found by its name. This file detects the format.

The format is detected from the content: a file's first bytes, its tensors' names, a folder's config. Nothing that is
read is executed: safetensors, GGUF, or pickles through torch's `weights_only=True`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import AdapterError, LorakitWarning, did_you_mean

if TYPE_CHECKING:
    import torch

    from ..adapter.adapter import Adapter
    from .format import Format, ReadOptions

    FOLDERS: tuple[str, ...]  # written as a folder with a config and the tensors; the others are one file
    TAKES_ALPHA: tuple[str, ...]  # their files may lack alpha: the caller gives it
    TELLS_MODEL: tuple[str, ...]  # of diffusion models, told by names and widths or `model_type`

FORMATS = ("peft", "adalora", "loralib", "kohya", "diffusers", "comfyui", "cloneofsimo", "mlx", "gguf")
# In the order in which they are asked whether a path is theirs. A file of ComfyUI's is read as diffusers', and a
# folder of AdaLoRA as PEFT's.
DETECTED = ("peft", "gguf", "kohya", "cloneofsimo", "mlx", "diffusers", "loralib")
_TRAITS = {"FOLDERS": "is_folder", "TAKES_ALPHA": "takes_alpha", "TELLS_MODEL": "tells_model"}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> tuple[str, ...]:
        """Return the formats that say so of themselves; lazily, because their files import torch."""
        if name not in _TRAITS:
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        return tuple(format for format in FORMATS if getattr(format_named(format), _TRAITS[name]))


def format_named(name: str) -> Format:
    """Return the format of this name: `FORMAT` of the module `formats/<name>.py`. AdapterError if there is none."""
    if name not in FORMATS:
        raise AdapterError(
            f"unknown adapter format '{name}'{did_you_mean(name, FORMATS)}\n  known: {', '.join(FORMATS)}"
        )
    found: Format = import_module(f".{name}", __name__).FORMAT
    return found


def load(
    source: str | Path,
    *,
    format: str | None = None,
    revision: str | None = None,
    alpha: float | None = None,
    packed: dict[str, list[bool]] | None = None,
    base: Any = None,
    model_type: str | None = None,
) -> Adapter:
    """Read an adapter in any of `FORMATS`.

    source: a folder, a file, or a hub id (`revision`: its branch, tag or commit).
    alpha: required if the file does not hold it (always for loralib; for MLX without its config).
    packed: the adapted parts of loralib's MergedLinear. base: the base's folder or config, for the GGUF of a Llama.
    model_type: which diffusion model a file is for (`names.KNOWN`), where names and widths do not tell; "other" keeps
    the file's own names.

    Raises AdapterError for anything that is not a valid adapter; sizes are checked before memory is allocated.
    """
    from .format import ReadOptions

    named = None if format is None else format_named(format)
    path = find(source, revision)
    named = named or format_named(format_of(path))
    options = ReadOptions(alpha, packed, base, model_type)
    _refuse(named, path, options)
    return named.read(path, options)


def save(
    adapter: Adapter,
    path: str | Path,
    format: str = "peft",
    *,
    dtype: torch.dtype | Literal["q8_0"] | None = None,
    base: Any = None,
    keep_alpha: bool = False,
) -> Path:
    """Write an adapter and return the path: "peft", "adalora" and "mlx" are folders, the others files.

    dtype: the precision to write (default: unchanged); "q8_0", blocks of 8 bits, is for "gguf" only.
    base: the base's folder or config, for "gguf".
    keep_alpha: write alphas as they are. By default "diffusers" gets them folded into B (alpha = rank), and "kohya" too
    where they differ by module: not all programs that read these files read such alphas right.

    AdapterError listing everything that the format cannot hold (see `losses`); nothing is written then.
    LorakitWarning where PEFT itself would not load all of it.
    """
    from ..adapter.algebra.edit import cast
    from ..io.staging import staged
    from .format import WriteOptions

    named, path = format_named(format), Path(path).expanduser()
    options = WriteOptions(base, "q8_0" if dtype == "q8_0" else None, keep_alpha)
    if options.blocks is not None and not named.takes_blocks:
        raise AdapterError(f"q8_0 is a type of GGUF's tensors, which {format} does not have\n  give bf16, fp16 or fp32")
    if isinstance(dtype, str) and options.blocks is None:
        raise AdapterError(f"dtype is '{dtype}'; expected a torch dtype, or 'q8_0' for gguf")
    adapter = adapter if dtype is None or isinstance(dtype, str) else cast(adapter, dtype)
    if (said := named.note(adapter)) is not None:
        warnings.warn(f"{path}: {said}", LorakitWarning, stacklevel=2)
    with staged(path, named.stale(path)) as target:
        written = named.write(adapter, target, options)
    return path / written.relative_to(target)


def stale(format: str, path: Path) -> list[str]:
    """The names of an older adapter's files, in the folder or beside the file `path`, that `save` deletes unless it
    writes them.
    """
    return format_named(format).stale(path)


def save_as_read(
    adapter: Adapter,
    path: str | Path,
    format: str,
    *,
    dtype: torch.dtype | Literal["q8_0"] | None = None,
    base: Any = None,
) -> Path:
    """Write an adapter in the format it was read from, in that file's own spelling of its keys: ComfyUI's stays.
    Otherwise as `save`.
    """
    from ..adapter.algebra.edit import cast
    from .format import WriteOptions

    named, spelling = format_named(format), adapter.metadata.get("spelling")
    if not spelling or isinstance(dtype, str) or not named.holds(spelling):
        return save(adapter, path, format, dtype=dtype, base=base)
    adapter = adapter if dtype is None else cast(adapter, dtype)
    return named.write(adapter, Path(path).expanduser(), WriteOptions(base, spelling=spelling))


def losses(adapter: Adapter, format: str, path: Path | None = None) -> list[str]:
    """What the format cannot hold of this adapter, one line each. `path`: where it would be written; cloneofsimo's .pt
    holds less than its .safetensors.
    """
    return format_named(format).losses(adapter, path)


def format_of(source: str | Path) -> str:
    """The format of `FORMATS` that a path holds. AdapterError if it holds no adapter."""
    path = find(source)
    owner = next((form.name for form in _detected() if form.owns(path)), None)
    if owner is not None:
        return owner

    from .inside import not_adapter
    from .wrappers import keys_unwrapped

    keys = keys_unwrapped(path)
    found = next((form.name for form in _detected() if form.fits(path, keys)), None)
    if found is None:
        raise AdapterError(f"{not_adapter(keys, path)}\n  known formats: {', '.join(FORMATS)}")
    return found


def find(source: str | Path, revision: str | None = None) -> Path:
    """The path of an adapter's file or folder: as given, inside the given folder, or downloaded from the hub.
    AdapterError if there is none, or several.
    """
    from .hub import fetch
    from .inside import adapter_in

    path = Path(source).expanduser()
    path = path if path.exists() else fetch(str(source), revision)
    return adapter_in(path) if path.is_dir() else path


def weights_of(path: Path) -> Path | None:
    """The file with an adapter's tensors. `path`: a result of `find`. None if the file is missing."""
    if not path.is_dir():
        return path
    files = (path / name for form in _detected() for name in form.files)
    return next((file for file in files if file.is_file()), None)


def _detected() -> Iterator[Format]:
    """One by one, because most paths are an early one's, and each file's import takes time."""
    return map(format_named, DETECTED)


def _refuse(form: Format, path: Path, options: ReadOptions) -> None:
    """Raise AdapterError for an option that the format does not take, ConfigError for an unknown model type."""
    if options.alpha is not None and not form.takes_alpha:
        raise AdapterError(f"{path} is a {form.name} adapter, which holds its alpha\n  leave out alpha (--alpha)")
    if options.packed is not None and not form.takes_packed:
        raise AdapterError(
            f"{path} is a {form.name} adapter, and packed is for loralib's MergedLinear\n  leave out packed"
        )
    if options.model_type is not None:
        _check_model_type(options.model_type)


def _check_model_type(model: str) -> None:
    from ..errors import ConfigError
    from . import kohya, names

    if model not in (*names.KNOWN, kohya.OTHER):
        raise ConfigError(
            f"there is no model type '{model}'{did_you_mean(model, (*names.KNOWN, kohya.OTHER))}\n"
            f"  known: {', '.join(names.KNOWN)}; or '{kohya.OTHER}'"
        )
