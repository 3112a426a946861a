"""How an adapter is written: one file per format, each with `read` and `write`; here, which one a path holds.

`load` tells the format by content. Nothing that is read is executed: safetensors, or pickles through torch's
`weights_only=True`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AdapterError, did_you_mean

if TYPE_CHECKING:
    from ..adapter.adapter import Adapter

FORMATS = ("peft", "loralib")


def load(source: str | Path, *, format: str | None = None, revision: str | None = None, **options: Any) -> Adapter:
    """Read an adapter.

    source: PEFT's folder (or a file in it), a loralib checkpoint (`alpha=` must be given: the file does not hold it), or a
    hub id. Raises AdapterError for anything that is not a sound adapter; nothing is built before sizes are checked.
    """
    from . import loralib, peft

    path = Path(source)
    if not path.exists():
        path = _download(str(source), revision)
    if format is None:
        format = "peft" if peft.is_peft(path) else "loralib"
    if format == "peft":
        return peft.read(path, **options)
    if format == "loralib":
        return loralib.read(path, **options)
    raise _unknown(format)


def save(adapter: Adapter, path: str | Path, format: str = "peft", **options: Any) -> Path:
    """Write an adapter: "peft" (a folder that PEFT and all that read it load) or "loralib" (one state-dict file)."""
    from . import loralib, peft

    if format == "peft":
        return peft.write(adapter, Path(path), **options)
    if format == "loralib":
        return loralib.write(adapter, Path(path), **options)
    raise _unknown(format)


def _unknown(format: str) -> AdapterError:
    return AdapterError(f"unknown adapter format '{format}'{did_you_mean(format, FORMATS)}\n  known: {', '.join(FORMATS)}")


def _download(name: str, revision: str | None) -> Path:
    """A hub id's files. Anything that looks like a local path is not looked for on the hub."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or Path(name).suffix in {".safetensors", ".bin", ".pt", ".json"}:
        here = Path(name).parent
        known = [p.name for p in here.iterdir()] if here.is_dir() else []
        raise AdapterError(f"no adapter at '{name}': there is no such file or folder{did_you_mean(Path(name).name, known)}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors", "adapter_model.bin"]))
    except Exception as error:
        raise AdapterError(
            f"no adapter at '{name}': no such folder here, and the hub did not give it ({type(error).__name__}: {error})"
        ) from error
