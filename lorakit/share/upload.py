"""Prepare an adapter's files for upload: its own files only, checked, and without local paths.

In PEFT's folder these are `adapter_config.json`, `adapter_model.safetensors` and `lorakit.json`, and what this names
beside them (virtual tokens, their encoder), in MLX's the config and the tensors, in other formats the single file.
Paths are removed from the folders' JSON and from the metadata in the tensor file's header; tensors are not changed.
Single files are not changed either: their author's hashes may depend on them.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import AdapterError, LorakitError
from ..formats import FOLDERS, TAKES_ALPHA, diffusers, load, mlx, peft_files
from ..io.gguf_header import is_gguf, read_gguf
from ..io.json_object import read_json
from ..io.stream import StreamWriter, read_header
from .paths import PathCleaner

SAFE = (".safetensors", ".gguf")


class PreparedFiles(NamedTuple):
    """The files to upload. changed: what differs from the local files. left: where local paths remain."""

    files: dict[str, Path]
    changed: list[str]
    left: list[str]


def files_of(path: Path, form: str) -> dict[str, Path]:
    """Return an adapter's own files: name in the repository -> path. Raises AdapterError, also for pickles."""
    if form not in FOLDERS:
        file = path / diffusers.FILE if path.is_dir() else path
        if file.suffix not in SAFE:
            raise AdapterError(
                f"{file} is a pickle, which can run code where it is loaded\n"
                f"  convert it to safetensors first: lorakit convert {file} OUT --to peft"
            )
        return {file.name: file}
    folder = path if path.is_dir() else path.parent
    weights = peft_files.WEIGHTS if form == "peft" else mlx.WEIGHTS
    if not (folder / weights).is_file():
        raise AdapterError(
            f"{folder} has no {weights}\n"
            f"  pickled tensors are not uploaded; convert them: lorakit convert {folder} OUT --to peft"
        )
    if form == "peft":
        inside(folder / peft_files.OURS, "remove it")  # before it is read
    try:
        names = peft_files.own_files(folder) if form == "peft" else [mlx.CONFIG, mlx.WEIGHTS]
    except LorakitError as error:
        raise AdapterError(f"nothing was uploaded: {error}") from error
    for name in names[2:]:  # config and tensors are checked when loaded; any other JSON file could be anything
        inside(folder / name, "remove it", folder)
    return {name: folder / name for name in names if (folder / name).is_file()}


def inside(file: Path, otherwise: str, folder: Path | None = None) -> None:
    """Raise AdapterError for a symlink out of the adapter's folder: a downloaded adapter could link to any local file.

    otherwise: another fix, for the message. folder: the adapter's, if it is not the file's. Links inside
    huggingface_hub's cache are allowed (models--OWNER--NAME/snapshots/COMMIT/FILE -> .../blobs/HASH).
    """
    target, home = file.resolve(), (folder or file.parent).resolve()
    caches = [p.parent for p in home.parents if p.name == "snapshots" and p.parent.name.startswith("models--")]
    allowed = [home, *(cache / "blobs" for cache in caches)]
    if file.is_file() and not any(target.is_relative_to(root) for root in allowed):
        raise AdapterError(
            f"nothing was uploaded: {file} is a link that leads out of its folder, to {target}\n"
            f"  replace the link by a copy if the file is the adapter's, or {otherwise}"
        )


def check(files: Mapping[str, Path], path: Path, form: str, alpha: float | None, base: Path | None) -> None:
    """Check that these files load, without others beside them, and have no NaN or infinity.

    Raises AdapterError, which names files under `path`.
    """
    alpha = alpha if form in TAKES_ALPHA else None
    with ExitStack() as stack:
        source = here = next(iter(files.values()))
        if form in FOLDERS:
            source = here = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorakit-push-")))
            for name, file in files.items():
                _link(file, source / name)
        try:
            load(source, alpha=alpha, base=base).check()
        except AdapterError as error:
            here, home = here if here.is_dir() else here.parent, path if path.is_dir() else path.parent
            raise AdapterError(f"nothing was uploaded: {str(error).replace(str(here), str(home))}") from error


def _link(file: Path, at: Path) -> None:
    """Link a file, or copy it where links are not allowed (Windows)."""
    at.parent.mkdir(exist_ok=True)
    try:
        at.symlink_to(file.resolve())
    except OSError:
        shutil.copyfile(file, at)


def without_local_paths(files: dict[str, Path], base_model: str | None, stack: ExitStack) -> PreparedFiles:
    """Return the files without local paths: as copies in a folder that `stack` removes, or unchanged if there are none.

    A single file is never changed; its paths are reported as left. base_model: the hub id to call the base by. Raises
    AdapterError for JSON that is nested too deeply.
    """
    is_single = len(files) == 1
    cleaner = PathCleaner(None if is_single else base_model)
    changed: dict[str, Any] = {}
    for name, file in files.items():
        try:
            value = read_json(file) if name.endswith(".json") else _header_texts(file)
            if name.endswith(".json"):
                clean = cleaner.clean(value, name)
            else:
                clean = {key: cleaner.clean_text(text, f"{name}, {key}", key) for key, text in value.items()}
        except RecursionError as error:
            raise AdapterError(f"nothing was uploaded: {file}: its JSON is nested too deeply") from error
        if clean != value:
            changed[name] = clean
    left = [f"{where}: {what}" for where, what in cleaner.left]
    if is_single:
        return PreparedFiles(files, [], [*left, *(f"{where}: holds a local path" for where, _ in cleaner.cut)])
    if not changed:
        return PreparedFiles(files, [], left)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorakit-push-")))
    for name, file in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if name not in changed:
            shutil.copyfile(file, folder / name)
        elif name.endswith(".json"):
            (folder / name).write_text(json.dumps(changed[name], indent=2, ensure_ascii=False) + "\n", encoding="utf8")
        else:
            _copy_with_header(file, folder / name, changed[name])
    copies = {name: folder / name for name in files}
    return PreparedFiles(copies, [f"{where}: {what}" for where, what in cleaner.cut], left)


def _header_texts(file: Path) -> dict[str, str]:
    """Return the texts in a file's header. Malformed metadata was refused when the file was checked."""
    metadata = read_gguf(file)[0] if is_gguf(file) else read_header(file)[1]
    return {k: v for k, v in metadata.items() if isinstance(v, str)} if isinstance(metadata, dict) else {}


def _copy_with_header(file: Path, out: Path, texts: Mapping[str, str]) -> None:
    """Copy the tensors, bit for bit and in order, with other texts in the header."""
    slots = dict(sorted(read_header(file)[0].items(), key=lambda item: item[1].start))
    with StreamWriter(out, {name: (s.dtype, s.shape, s.nbytes) for name, s in slots.items()}, texts) as writer:
        for slot in slots.values():
            for block in slot.copied():
                writer.write(block)
