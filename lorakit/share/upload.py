"""What of an adapter is uploaded: its own files, checked, and without the paths of the machine that they were made on.

Of PEFT's folder that is `adapter_config.json`, `adapter_model.safetensors` and `lorakit.json`, of MLX's the config and the tensors, of the
other formats the one file. Paths are looked for in the folders' JSON, and in the header that lorakit gives the tensors' file; the tensors
stay as they are. So does a single file: it is its author's, maybe with hashes of its own.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import AdapterError
from ..formats import FOLDERS, TAKES_ALPHA, diffusers, load, mlx, peft
from ..io.gguf_header import is_gguf, read_gguf
from ..io.json_object import read_json
from ..io.stream import StreamWriter, read_header
from .paths import Paths

# A folder's config, its tensors, and what else is the adapter's.
FILES = {"peft": (peft.CONFIG, peft.WEIGHTS, peft.OURS), "mlx": (mlx.CONFIG, mlx.WEIGHTS)}
SAFE = (".safetensors", ".gguf")


@dataclass(frozen=True)
class Mended:
    """The files as they go. `changed`: what is another one in them than here; `left`: where they hold local paths still."""

    files: dict[str, Path]
    changed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def files_of(path: Path, form: str) -> dict[str, Path]:
    """An adapter's own files, by their names in the repository. AdapterError for pickles, which people would have to trust."""
    if form in FOLDERS:
        folder = path if path.is_dir() else path.parent
        config, weights, *more = FILES[form]
        if not (folder / weights).is_file():
            raise AdapterError(f"{folder} has no {weights}\n  pickled tensors are not uploaded; write them anew: {_convert(folder)}")
        for name in more:  # any JSON is one of these; a config and tensors have to be an adapter's
            inside(folder / name, "remove it")
        return {name: folder / name for name in (config, weights, *more) if (folder / name).is_file()}
    file = path / diffusers.FILE if path.is_dir() else path
    if file.suffix not in SAFE:
        raise AdapterError(
            f"{file} is a pickle, which whoever downloads it would have to trust\n  write it as safetensors first: {_convert(file)}"
        )
    return {file.name: file}


def inside(file: Path, otherwise: str) -> None:
    """AdapterError for a link that leads out of the file's folder: an adapter from elsewhere may have one to anything that is here.

    huggingface_hub's cache is made of such links, models--OWNER--NAME/snapshots/COMMIT/FILE to .../blobs/HASH.
    """
    if not file.is_file():
        return
    target, home = file.resolve(), file.parent.resolve()
    roots = [home]
    roots += [p.parent / "blobs" for p in home.parents if p.name == "snapshots" and p.parent.name.startswith("models--")]
    if not any(target.is_relative_to(root) for root in roots):
        raise AdapterError(
            f"nothing was uploaded: {file} is a link that leads out of its folder, to {target}\n"
            f"  put a copy of that in its place if it is the adapter's, or {otherwise}"
        )


def _convert(path: Path) -> str:
    return f"lorakit convert {path} OUT --to peft"


def check(files: Mapping[str, Path], path: Path, form: str, alpha: float | None, base: Path | None) -> None:
    """That what is uploaded can be read. Reading looks for NaN and infinity, too."""
    first = next(iter(files.values()))
    try:
        load(first.parent if form in FOLDERS else first, alpha=alpha if form in TAKES_ALPHA else None, base=base).check()
    except AdapterError as error:
        raise AdapterError(
            f"nothing was uploaded: {str(error).replace(str(first.parent), str(path if path.is_dir() else path.parent))}"
        ) from error


def mended(files: dict[str, Path], base_model: str | None, stack: ExitStack) -> Mended:
    """Sound files without this machine's paths: themselves if there are none, or if it is a single file; else copies."""
    if len(files) == 1:
        found = Paths()
        for name, file in files.items():
            for key, text in _notes(file).items():
                found.clean_text(text, f"{name}, {key}", key)
        return Mended(files, [], _told([*((where, "holds a local path") for where, _ in found.cut), *found.left]))
    found = Paths(base_model)
    clean: dict[str, Any] = {}
    for name, file in files.items():
        try:
            value = _cleaned(name, file, found)
        except RecursionError as error:
            raise AdapterError(f"nothing was uploaded: {file}: its JSON is nested too deeply") from error
        if value is not None:
            clean[name] = value
    if not clean:
        return Mended(files, [], _told(found.left))
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorakit-push-")))
    for name, file in files.items():
        if name not in clean:
            shutil.copyfile(file, folder / name)
        elif name.endswith(".json"):
            (folder / name).write_text(json.dumps(clean[name], indent=2, ensure_ascii=False) + "\n", encoding="utf8")
        else:
            _with_notes(file, folder / name, clean[name])
    return Mended({name: folder / name for name in files}, _told(found.cut), _told(found.left))


def _told(lines: list[tuple[str, str]]) -> list[str]:
    return [f"{where}: {what}" for where, what in lines]


def _cleaned(name: str, file: Path, found: Paths) -> dict[str, Any] | None:
    """A config, or of a tensors' file its header's texts, where it has to be another one; else None."""
    if name.endswith(".json"):
        value = read_json(file)
        clean = found.clean(value, name)
    else:
        value = _notes(file)
        clean = {key: found.clean_text(text, f"{name}, {key}", key) for key, text in value.items()}
    return clean if clean != value else None


def _notes(file: Path) -> dict[str, str]:
    """The texts in a file's header. (One that is no map of texts has been refused when the file was read.)"""
    notes = read_gguf(file)[0] if is_gguf(file) else read_header(file)[1]
    return {k: v for k, v in notes.items() if isinstance(v, str)} if isinstance(notes, dict) else {}


def _with_notes(file: Path, out: Path, notes: Mapping[str, str]) -> None:
    """The same tensors, to the bit and in the same order, under other texts."""
    slots = dict(sorted(read_header(file)[0].items(), key=lambda item: item[1].start))
    with StreamWriter(out, {name: (s.dtype, s.shape, s.nbytes) for name, s in slots.items()}, notes) as writer:
        for slot in slots.values():
            for block in slot.copied():
                writer.write(block)
