"""How an adapter is written: one file per format, each with `read`, `losses` and `write`; here, which one a path holds.

The format is told by content: a file's first bytes, its tensors' names, a folder's config. Nothing that is read is
executed: safetensors, GGUF, or pickles through torch's `weights_only=True`.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import AdapterError, LorakitWarning, did_you_mean

if TYPE_CHECKING:
    import torch

    from ..adapter.adapter import Adapter

FORMATS = ("peft", "loralib", "kohya", "diffusers", "cloneofsimo", "mlx", "gguf")
FOLDERS = ("peft", "mlx")  # written as a folder: a config and the tensors; the others are one file
TAKES_ALPHA = ("loralib", "mlx")  # read with an alpha that is given: loralib's files hold none, old ones of MLX neither


def load(
    source: str | Path,
    *,
    format: str | None = None,
    revision: str | None = None,
    alpha: float | None = None,
    packed: dict[str, list[bool]] | None = None,
    base: Any = None,
) -> Adapter:
    """Read an adapter in any of `FORMATS`.

    source: a folder, a file, or a hub id. `alpha` must be given where the file does not hold it (always for loralib,
    for MLX without its config), `packed` for a MergedLinear of loralib, `base` (the base's folder or config) for a GGUF
    of a Llama. Raises AdapterError for anything that is not a sound adapter; nothing is built before sizes are checked.
    """
    from ..io.tensors import read_tensors

    if format is not None and format not in FORMATS:
        raise _unknown(format)
    path = find(source, revision)
    format = format or format_of(path)
    reader = _module(format)
    if alpha is not None and format not in TAKES_ALPHA:
        raise AdapterError(
            f"{path} is a {format} adapter, which says itself what alpha is\n  leave alpha (--alpha) out"
        )
    if packed is not None and format != "loralib":
        raise AdapterError(
            f"{path} is a {format} adapter, and packed is for loralib's MergedLinear\n  leave packed out"
        )
    if format == "peft":
        return reader.read(path)
    if format == "loralib":
        return reader.read(path, alpha, packed)
    if format == "gguf":
        return reader.read(path, base)
    if format == "cloneofsimo":
        return reader.load(path)
    file = _inside(path, format)
    tensors, header = read_tensors(file)
    return reader.read(file, tensors, header, alpha) if format == "mlx" else reader.read(file, tensors, header)


def save(
    adapter: Adapter,
    path: str | Path,
    format: str = "peft",
    *,
    dtype: torch.dtype | Literal["q8_0"] | None = None,
    base: Any = None,
) -> Path:
    """Write an adapter: "peft" and "mlx" are folders, the others files.

    dtype: the precision to write it in (by default as it is); "q8_0", blocks of 8 bits, for "gguf" alone. base: the
    base's folder or config, for "gguf". AdapterError, with all of it, where the format cannot hold something of the
    adapter (see `losses`); LorakitWarning where PEFT itself would not load all of it. Returns the path written.
    """
    from ..adapter.algebra.edit import cast
    from .peft_experts import misread, note

    path, blocks = Path(path).expanduser(), "q8_0" if dtype == "q8_0" else None
    if blocks is not None and format != "gguf":
        raise AdapterError(f"q8_0 is a type of GGUF's tensors, which {format} does not have\n  give bf16, fp16 or fp32")
    if isinstance(dtype, str) and blocks is None:
        raise AdapterError(f"dtype is '{dtype}'; expected a torch dtype, or 'q8_0' for gguf")
    adapter = adapter if dtype is None or isinstance(dtype, str) else cast(adapter, dtype)
    if format == "peft" and (said := note(misread(adapter), len(adapter.updates))) is not None:
        warnings.warn(f"{path}: {said}", LorakitWarning, stacklevel=2)
    return (
        _module(format).write(adapter, path, base, blocks) if format == "gguf" else _module(format).write(adapter, path)
    )


def losses(adapter: Adapter, format: str, path: Path | None = None) -> list[str]:
    """What of this adapter the format cannot hold, one line each. `path`: where it would be written, as endings differ
    in that.
    """
    return _module(format).losses(adapter, path) if format == "cloneofsimo" else _module(format).losses(adapter)


def format_of(source: str | Path) -> str:
    """Which of `FORMATS` a path holds. AdapterError if none."""
    from . import peft

    path = find(source)
    if peft.is_peft(path):
        return "peft"

    from ..io.gguf_header import is_gguf
    from ..io.tensors import keys_of
    from . import cloneofsimo, diffusers, kohya, mlx
    from .inside import not_adapter

    if path.is_dir():
        if mlx.is_mlx(path):
            return "mlx"
        if (path / diffusers.FILE).is_file():
            return "diffusers"
        return "mlx"  # its config alone, and reading says that the tensors are missing
    if is_gguf(path):
        return "gguf"
    if cloneofsimo.is_pickle_of_it(path):
        return "cloneofsimo"
    keys = keys_of(path)
    for format, module in (("kohya", kohya), ("cloneofsimo", cloneofsimo), ("mlx", mlx), ("diffusers", diffusers)):
        if module.fits(keys):
            return format
    if any(key.endswith(".lora_A") for key in keys):
        return "loralib"
    raise AdapterError(f"{not_adapter(keys, path)}\n  known formats: {', '.join(FORMATS)}")


def find(source: str | Path, revision: str | None = None) -> Path:
    """The path of an adapter's file or folder: as given, inside the folder given, or of a hub id's files."""
    from .hub import fetch
    from .inside import adapter_in

    path = Path(source).expanduser()
    path = path if path.exists() else fetch(str(source), revision)
    return adapter_in(path) if path.is_dir() else path


def weights_of(path: Path) -> Path | None:
    """The file with an adapter's tensors, of the folder or file that `find` gives; None if it is not there."""
    from . import diffusers, mlx, peft

    names = (peft.WEIGHTS, peft.PICKLE, mlx.WEIGHTS, diffusers.FILE)
    return next((path / name for name in names if (path / name).is_file()), None) if path.is_dir() else path


def _inside(path: Path, format: str) -> Path:
    """The file with the tensors, where `path` is its folder."""
    from . import diffusers, mlx

    return path / (mlx.WEIGHTS if format == "mlx" else diffusers.FILE) if path.is_dir() else path


def _module(format: str) -> Any:
    from importlib import import_module

    if format not in FORMATS:
        raise _unknown(format)
    return import_module(f".{format}", __name__)  # each format's file has its name


def _unknown(format: str) -> AdapterError:
    return AdapterError(
        f"unknown adapter format '{format}'{did_you_mean(format, FORMATS)}\n  known: {', '.join(FORMATS)}"
    )
