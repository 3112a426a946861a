"""Read and write adapters: one file for each format, with `read`, `losses` and `write`. This file detects the format.

The format is detected from the content: a file's first bytes, its tensors' names, a folder's config. Nothing that is
read is executed: safetensors, GGUF, or pickles through torch's `weights_only=True`.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import AdapterError, LorakitWarning, did_you_mean

if TYPE_CHECKING:
    import torch

    from ..adapter.adapter import Adapter

FORMATS = ("peft", "loralib", "kohya", "diffusers", "comfyui", "cloneofsimo", "mlx", "gguf")
FOLDERS = ("peft", "mlx")  # written as a folder with a config and the tensors; the others are one file
TAKES_ALPHA = ("loralib", "mlx")  # loralib's files, and old ones of MLX, do not hold alpha: the caller gives it
TELLS_MODEL = ("kohya", "diffusers", "comfyui")  # of diffusion models, told by names and widths or `model_type`


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
    from . import mlx
    from .inside import renamed
    from .wrappers import read_unwrapped

    if format is not None and format not in FORMATS:
        raise _unknown(format)
    path = find(source, revision)
    format = format or format_of(path)
    reader = _module(format)
    if alpha is not None and format not in TAKES_ALPHA:
        raise AdapterError(f"{path} is a {format} adapter, which holds its alpha\n  leave out alpha (--alpha)")
    if packed is not None and format != "loralib":
        raise AdapterError(
            f"{path} is a {format} adapter, and packed is for loralib's MergedLinear\n  leave out packed"
        )
    if model_type is not None:
        _check_model_type(model_type)
    if format == "peft":
        return reader.read(path)
    if format == "loralib":
        return reader.read(path, alpha, packed)
    if format == "gguf":
        return reader.read(path, base)
    if format == "cloneofsimo":
        return reader.load(path)
    file = _inside(path, format)
    if not file.exists():
        lies = renamed(path, file.stem, (".safetensors", ".npz"))
        raise AdapterError(
            f"{path}: {file.name} cannot be read: it is not there" + (lies or f"\n  put that file beside {mlx.CONFIG}")
        )
    tensors, header = read_unwrapped(file)
    return reader.read(file, tensors, header, alpha if format == "mlx" else model_type)


def save(
    adapter: Adapter,
    path: str | Path,
    format: str = "peft",
    *,
    dtype: torch.dtype | Literal["q8_0"] | None = None,
    base: Any = None,
) -> Path:
    """Write an adapter and return the path: "peft" and "mlx" are folders, the others files.

    dtype: the precision to write (default: unchanged); "q8_0", blocks of 8 bits, is for "gguf" only.
    base: the base's folder or config, for "gguf".

    AdapterError listing everything that the format cannot hold (see `losses`); nothing is written then.
    LorakitWarning where PEFT itself would not load all of it.
    """
    from ..adapter.algebra.edit import cast
    from ..io.staging import staged
    from .peft_experts import misread, note

    path, blocks = Path(path).expanduser(), "q8_0" if dtype == "q8_0" else None
    if blocks is not None and format != "gguf":
        raise AdapterError(f"q8_0 is a type of GGUF's tensors, which {format} does not have\n  give bf16, fp16 or fp32")
    if isinstance(dtype, str) and blocks is None:
        raise AdapterError(f"dtype is '{dtype}'; expected a torch dtype, or 'q8_0' for gguf")
    adapter = adapter if dtype is None or isinstance(dtype, str) else cast(adapter, dtype)
    if format == "peft" and (said := note(misread(adapter), len(adapter.updates))) is not None:
        warnings.warn(f"{path}: {said}", LorakitWarning, stacklevel=2)
    module = _module(format)
    with staged(path, stale(format, path)) as target:
        written = module.write(adapter, target, base, blocks) if format == "gguf" else module.write(adapter, target)
    return path / written.relative_to(target)


def stale(format: str, path: Path) -> list[str]:
    """The names of an older adapter's files, in the folder or beside the file `path`, that `save` deletes unless it
    writes them.
    """
    return _module(format).stale(path) if format in ("peft", "cloneofsimo") else []


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
    from .comfyui import write_as_read

    spelling = adapter.metadata.get("spelling") if format in TELLS_MODEL else None
    if not spelling or isinstance(dtype, str) or ("prefix" in spelling) != (format == "kohya"):
        return save(adapter, path, format, dtype=dtype, base=base)
    path = Path(path).expanduser()
    if format == "kohya":
        from .kohya import write

        return write(adapter if dtype is None else cast(adapter, dtype), path, spelling=spelling)
    return write_as_read(adapter if dtype is None else cast(adapter, dtype), path, spelling)


def losses(adapter: Adapter, format: str, path: Path | None = None) -> list[str]:
    """What the format cannot hold of this adapter, one line each. `path`: where it would be written; cloneofsimo's .pt
    holds less than its .safetensors.
    """
    return _module(format).losses(adapter, path) if format == "cloneofsimo" else _module(format).losses(adapter)


def format_of(source: str | Path) -> str:
    """The format of `FORMATS` that a path holds. AdapterError if it holds no adapter."""
    from . import peft

    path = find(source)
    if peft.is_peft(path):
        return "peft"

    from ..io.gguf_header import is_gguf
    from . import cloneofsimo, diffusers, kohya, mlx
    from .inside import not_adapter
    from .wrappers import keys_unwrapped

    if path.is_dir():
        if mlx.is_mlx(path):
            return "mlx"
        if (path / diffusers.FILE).is_file():
            return "diffusers"
        return "mlx"  # a config alone: reading it reports the missing tensors
    if is_gguf(path):
        return "gguf"
    if cloneofsimo.is_pickle_of_it(path):
        return "cloneofsimo"
    keys = keys_unwrapped(path)
    if path.name in (peft.WEIGHTS, peft.PICKLE) and not any(map(diffusers.is_spelling, keys)):
        raise AdapterError(not_adapter(keys, path))  # its config is missing
    for format, module in (("kohya", kohya), ("cloneofsimo", cloneofsimo), ("mlx", mlx), ("diffusers", diffusers)):
        if module.fits(keys):
            return format
    if any(key.endswith((".lora_A", ".lora_a.weight")) for key in keys):
        return "loralib"
    raise AdapterError(f"{not_adapter(keys, path)}\n  known formats: {', '.join(FORMATS)}")


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
    from . import diffusers, mlx, peft

    names = (peft.WEIGHTS, peft.PICKLE, mlx.WEIGHTS, mlx.NPZ, diffusers.FILE)
    return next((path / name for name in names if (path / name).is_file()), None) if path.is_dir() else path


def _inside(path: Path, format: str) -> Path:
    """The file with the tensors, if `path` is a folder."""
    from . import diffusers, mlx

    if not path.is_dir():
        return path
    return mlx.weights_in(path) if format == "mlx" else path / diffusers.FILE


def _check_model_type(model: str) -> None:
    from ..errors import ConfigError
    from . import kohya, names

    if model not in (*names.KNOWN, kohya.OTHER):
        raise ConfigError(
            f"there is no model type '{model}'{did_you_mean(model, (*names.KNOWN, kohya.OTHER))}\n"
            f"  known: {', '.join(names.KNOWN)}; or '{kohya.OTHER}'"
        )


def _module(format: str) -> Any:
    from importlib import import_module

    if format not in FORMATS:
        raise _unknown(format)
    return import_module(f".{format}", __name__)  # each format's file has its name


def _unknown(format: str) -> AdapterError:
    return AdapterError(
        f"unknown adapter format '{format}'{did_you_mean(format, FORMATS)}\n  known: {', '.join(FORMATS)}"
    )
