"""What of an adapter is uploaded: its own files, checked, and without the paths of the machine that they were made on.

Of PEFT's folder that is `adapter_config.json`, `adapter_model.safetensors` and `lorakit.json`, of MLX's the config and the tensors, of the
other formats the one file. Paths are looked for in the folders' JSON, and in the header that lorakit gives the tensors' file; the tensors
stay as they are.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .card.words import hub_id, is_local_path, without_paths
from .errors import AdapterError
from .formats import load
from .formats.files import parse_json, read_json

# Formats that are folders: their config, and the tensors.
FOLDERS = {
    "peft": ("adapter_config.json", "adapter_model.safetensors", "lorakit.json"),
    "mlx": ("adapter_config.json", "adapters.safetensors"),
}
SAFE = (".safetensors", ".gguf")
_BASE = "base_model_name_or_path"


def files_of(path: Path, form: str) -> dict[str, Path]:
    """An adapter's own files, by their names in the repository. AdapterError for pickles, which people would have to trust."""
    if form in FOLDERS:
        folder = path if path.is_dir() else path.parent
        config, weights, *more = FOLDERS[form]
        if not (folder / weights).is_file():
            raise AdapterError(f"{folder} has no {weights}\n  pickled tensors are not uploaded; write them anew: {_convert(folder)}")
        return {name: folder / name for name in (config, weights, *more) if (folder / name).is_file()}
    file = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
    if file.suffix not in SAFE:
        raise AdapterError(
            f"{file} is a pickle, which whoever downloads it would have to trust\n  write it as safetensors first: {_convert(file)}"
        )
    return {file.name: file}


def _convert(path: Path) -> str:
    return f"lorakit convert {path} OUT --to peft"


def check(files: Mapping[str, Path], path: Path, form: str, alpha: float | None, base: Path | None) -> None:
    """That what is uploaded can be read. Reading looks for NaN and infinity, too."""
    first = next(iter(files.values()))
    try:
        load(first.parent if form in FOLDERS else first, alpha=alpha if form in ("loralib", "mlx") else None, base=base).check()
    except AdapterError as error:
        raise AdapterError(
            f"nothing was uploaded: {str(error).replace(str(first.parent), str(path if path.is_dir() else path.parent))}"
        ) from error


def mended(files: dict[str, Path], base_model: str | None, stack: ExitStack) -> tuple[dict[str, Path], list[str]]:
    """A folder's files without this machine's paths: themselves if there are none, else copies. And what was changed."""
    if len(files) == 1:
        return files, []
    changed: dict[str, Any] = {}
    told: list[str] = []
    for name, file in files.items():
        try:
            clean = _cleaned(name, file, base_model, told)
        except RecursionError as error:
            raise AdapterError(f"nothing was uploaded: {file}: its JSON is nested too deeply") from error
        if clean is not None:
            changed[name] = clean
    if not changed:
        return files, []
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorakit-push-")))
    for name, file in files.items():
        if name not in changed:
            shutil.copyfile(file, folder / name)
        elif name.endswith(".json"):
            (folder / name).write_text(json.dumps(changed[name], indent=2, ensure_ascii=False) + "\n", encoding="utf8")
        else:
            _with_header(file, folder / name, changed[name])
    return {name: folder / name for name in files}, told


def _cleaned(name: str, file: Path, base_model: str | None, told: list[str]) -> Any:
    """The JSON of a config, or of a tensors' file its header, where it has to be another one; else None."""
    if name.endswith(".json"):
        value = read_json(file)
        clean = _clean(value, base_model, name, told)
        return clean if clean != value else None
    header = _header(file)
    notes = _notes(header)
    clean = {k: _clean_text(v, base_model, f"{name}, {k}", told) for k, v in notes.items()}
    return header | {"__metadata__": clean} if clean != notes else None


def _clean(value: Any, base_model: str | None, where: str, told: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {k: _clean_base(v, base_model, f"{where}, {k}", told) if k in (_BASE, "model") else _clean(v, base_model, f"{where}, {k}", told)
                for k, v in value.items()}  # fmt: skip
    if isinstance(value, list):
        return [_clean(v, base_model, where, told) for v in value]
    if isinstance(value, str) and is_local_path(value):  # as a whole: a part of a text may be a regular expression
        clean = without_paths(value)
        told.append(f"{where}: a local path is cut to {clean!r}")
        return clean
    return value


def _clean_base(value: Any, base_model: str | None, where: str, told: list[str]) -> Any:
    if isinstance(value, str) and base_model is not None and value != base_model:
        told.append(f"{where}: the base is called {base_model!r}")
        return base_model
    if isinstance(value, str) and (cached := hub_id(value)) and cached != value:  # a folder of the hub's cache
        told.append(f"{where}: the base is called {cached!r}")
        return cached
    return _clean(value, base_model, where, told)


def _clean_text(text: str, base_model: str | None, where: str, told: list[str]) -> str:
    """A header's value, which may be JSON itself."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _clean(text, base_model, where, told)
    if not isinstance(value, dict):
        return _clean(text, base_model, where, told)
    clean = _clean(value, base_model, where, told)
    return text if clean == value else json.dumps(clean, sort_keys=True)


def _header(file: Path) -> dict[str, Any]:
    """A safetensors file's header. Its length is checked against the file's."""
    with file.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        if size > file.stat().st_size - 8:
            raise AdapterError(f"{file} is not a readable safetensors file: its header is longer than the file")
        return parse_json(f.read(size).decode("utf8", "replace"), f"{file} (its header)")


def _notes(header: Mapping[str, Any]) -> dict[str, str]:
    """The texts in a header; one that is no map of texts is refused when the file is read."""
    notes = header.get("__metadata__")
    return {k: v for k, v in notes.items() if isinstance(v, str)} if isinstance(notes, dict) else {}


def _with_header(file: Path, out: Path, header: Mapping[str, Any]) -> None:
    """The same tensors under another header. (Their places count from the header's end.)"""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with file.open("rb") as f, out.open("wb") as g:
        f.seek(8 + int.from_bytes(f.read(8), "little"))
        g.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(f, g, 1 << 20)


def paths_left(files: Mapping[str, Path]) -> list[str]:
    """The keys of a single file's header that hold local paths. The file is its author's, with hashes of its own: it goes as it is."""
    file = next(iter(files.values()))
    if len(files) > 1 or file.suffix != ".safetensors":
        return []
    return [key for key, value in _notes(_header(file)).items() if "://" not in value and without_paths(value) != value]
