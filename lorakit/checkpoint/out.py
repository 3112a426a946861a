"""OUT, the path a merge writes to: never the base or an adapter, and complete or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..errors import LorakitError, listing
from .base import CONFIG
from .parts import PIPELINE, Part
from .quantized.found import SETTINGS_FILES

NOTE = "lorakit_merge.json"
WEIGHTS = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ot",
    ".tflite",
    ".npz",
}
SLACK = 1 << 20  # for headers and what the file system adds


def check_out(base: Path, adapters: Iterable[Path], out: Path, force: bool) -> None:
    """Raise LorakitError if OUT exists (unless `force`), is not a sensible path for this base, or would overwrite an
    input.
    """
    for what, path in (("base", base), *(("adapter", a) for a in adapters)):
        if path == out or out in path.parents:
            raise LorakitError(
                f"OUT {out} {'is' if path == out else 'holds'} the {what} itself\n"
                f"  give another path: the {what} is only read"
            )
    if base in out.parents:
        raise LorakitError(f"OUT {out} is inside the base's folder\n  give a path elsewhere: the base is only read")
    if base.is_file() and out.suffix != ".safetensors":
        raise LorakitError(
            f"OUT {out}: the base is a single file, so the output is one too\n  give a name that ends in .safetensors"
        )
    if base.is_dir() and out.suffix in WEIGHTS:
        raise LorakitError(
            f"OUT {out}: the base is a folder, so the output is one too\n  give a name without '{out.suffix}'"
        )
    if not out.exists():
        return
    if not force:
        raise LorakitError(f"OUT {out} exists\n  give another path, or replace it with force=True (--force)")
    if out.is_dir() == base.is_file() or not (out.is_dir() or out.is_file()):
        existing, expected = "a folder" if out.is_dir() else "a file", "a single file" if base.is_file() else "a folder"
        raise LorakitError(
            f"OUT {out} is {existing}; the base is {expected}, so the output is one too\n  give another path"
        )
    if out.is_dir() and any(out.iterdir()) and not _is_checkpoint(out):
        raise LorakitError(
            f"OUT {out} holds no checkpoint, but {listing(sorted(p.name for p in out.iterdir()), 3)}; force would "
            "delete that\n"
            "  give another path"
        )
    here = Path.cwd()
    if out in (here, *here.parents, Path.home(), *Path.home().parents):
        raise LorakitError(
            f"OUT {out} is your home or working folder, or one above; force would delete it\n  give another folder"
        )


def other_files(folder: Path, parts: Iterable[Part]) -> tuple[dict[str, Path], list[str]]:
    """Return ({name within the folder: path} of files to copy, names of files left out).

    Copied is everything except the parts' weights, other models and adapters, and hidden files. A pipeline's other
    components are copied completely.
    """
    written = {Path(part.name, name) for part in parts for name in (*part.base.shards, part.base.index_name)}
    touched = {part.name for part in parts}
    pipeline = (folder / PIPELINE).is_file()
    copies: dict[str, Path] = {}
    left_out = []
    for path in sorted(_files_in(folder)):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or name in written or name == Path(NOTE):
            continue
        component = name.parts[0] if len(name.parts) > 1 else ""
        if pipeline and component and component not in touched and (folder / component / CONFIG).is_file():
            copies[str(name)] = path
            continue
        own = 1 if pipeline and component in touched else 0  # the component's own folder is a model, and belongs here
        folders = [folder.joinpath(*name.parts[:i]) for i in range(1 + own, len(name.parts))]
        if (
            _is_weights(path)
            or any(_is_model(f) for f in folders)
            or name.name in ("adapter_config.json", "lorakit.json")
        ):
            left_out.append(str(name))
        else:
            copies[str(name)] = path
    return copies, left_out


def without_settings(copies: Mapping[str, Path], quantization_changes: bool) -> tuple[dict[str, Path], list[str]]:
    """Return the files to copy without those that say how the base is quantized, if OUT is not, and a warning."""
    stale = [name for name in copies if quantization_changes and Path(name).name in SETTINGS_FILES]
    kept = {name: path for name, path in copies.items() if name not in stale}
    return kept, [f"not copied, as it says how the base is quantized: {name}" for name in stale]


def _files_in(folder: Path) -> Iterator[Path]:
    """Yield all files, also in linked folders (a cache has links). Raises LorakitError for a link to a folder that
    contains it.
    """
    for where, folders, files in os.walk(folder, followlinks=True):
        here = Path(where)
        above = {p.resolve() for p in (here, *here.parents) if p.is_relative_to(folder)}
        for name in folders:
            if (here / name).resolve() in above:
                raise LorakitError(
                    f"{Path(where) / name} is a link to a folder that it is in\n  take it out of the base's folder"
                )
        yield from (Path(where) / name for name in files if (Path(where) / name).is_file())


def check_space(out: Path, need: int) -> None:
    """Raise LorakitError if the disk has fewer than `need` bytes free."""
    there = next(p for p in out.parents if p.exists())
    free = shutil.disk_usage(there).free
    if free < need + SLACK:
        raise LorakitError(
            f"the disk has {free / 1e9:,.2f} GB free; the merged checkpoint takes {need / 1e9:,.2f} GB\n"
            "  free some space, or give an OUT on another disk"
        )


def copy(path: Path, to: Path) -> None:
    """Copy a file and sync it to the disk."""
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, to)
    with open(to, "rb+") as file:
        os.fsync(file.fileno())


def _is_weights(path: Path) -> bool:
    index = ".bin.index.", ".safetensors.index."
    return path.suffix in WEIGHTS or (path.suffix == ".json" and any(i in path.name for i in index))


def _is_checkpoint(folder: Path) -> bool:
    config = (folder / CONFIG).is_file() and any(map(_is_weights, folder.iterdir()))
    return config or (folder / PIPELINE).is_file() or (folder / NOTE).is_file()


def _is_model(folder: Path) -> bool:
    """Whether a folder within the base's holds a model or an adapter of its own."""
    names = {p.name for p in folder.iterdir()}
    return (
        folder.name == "original"
        or "adapter_config.json" in names
        or (CONFIG in names and any(_is_weights(folder / n) for n in names))
    )
