"""How an adapter is written: one file per format, each with `read` and `write`; here, which one a path holds.

`load` tells the format by content. Nothing that is read is executed: safetensors, or pickles through torch's
`weights_only=True`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AdapterError, did_you_mean

if TYPE_CHECKING:
    import torch

    from ..adapter.adapter import Adapter

FORMATS = ("peft", "loralib")


def load(
    source: str | Path,
    *,
    format: str | None = None,
    revision: str | None = None,
    alpha: float | None = None,
    packed: dict[str, list[bool]] | None = None,
) -> Adapter:
    """Read an adapter.

    source: PEFT's folder (or a file in it), a loralib checkpoint, or a hub id. `alpha` (always) and `packed` (for a
    MergedLinear) must be given for a loralib checkpoint, which does not hold them. Raises AdapterError for anything that is
    not a sound adapter; nothing is built before sizes are checked.
    """
    from . import loralib, peft

    path = Path(source).expanduser()
    if not path.exists():
        path = _download(str(source), revision)
    if format is None:
        format = "peft" if peft.is_peft(path) else "loralib"
    if format == "peft":
        if alpha is not None or packed is not None:
            raise AdapterError(f"{path} is a PEFT adapter, whose own config says what alpha and packed are\n  leave them out")
        return peft.read(path)
    if format == "loralib":
        return loralib.read(path, alpha, packed)
    raise _unknown(format)


def save(adapter: Adapter, path: str | Path, format: str = "peft", *, dtype: torch.dtype | None = None) -> Path:
    """Write an adapter: "peft" (a folder that PEFT and all that read it load) or "loralib" (one state-dict file).

    dtype: the precision to write it in (by default as it is). Returns the path written.
    """
    from . import loralib, peft

    adapter = adapter.to(dtype) if dtype else adapter
    if format == "peft":
        return peft.write(adapter, Path(path).expanduser())
    if format == "loralib":
        return loralib.write(adapter, Path(path).expanduser())
    raise _unknown(format)


def _unknown(format: str) -> AdapterError:
    return AdapterError(f"unknown adapter format '{format}'{did_you_mean(format, FORMATS)}\n  known: {', '.join(FORMATS)}")


def _download(name: str, revision: str | None) -> Path:
    """A hub id's files. Anything that looks like a local path is not looked for on the hub."""
    here = Path(name).expanduser().parent
    alike = did_you_mean(Path(name).name, [p.name for p in here.iterdir()]) if here.is_dir() else ""
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or Path(name).suffix in {".safetensors", ".bin", ".pt", ".json"}:
        raise AdapterError(f"no adapter at '{name}': there is no such file or folder{alike}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors", "adapter_model.bin"]))
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise AdapterError(
            f"no adapter at '{name}': no such folder here{alike}\n  and the hub did not give it: {type(error).__name__}: {reason}"
        ) from error
