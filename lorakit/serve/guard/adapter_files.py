"""What an adapter's files may contain, checked on a private copy before anything parses them.

Large files are looked at before they are copied too, so that what is refused costs no space.

    safetensors, GGUF        always; header and tensor count bounded
    numpy archive (.npz)     only from the command line: it is compressed
    pickle (.bin, .pt, ...)  only from the command line with --allow-pickle, and read with `weights_only=True`
    JSON                     size and nesting bounded; regular expressions in it must match quickly

A limit on the header is one on time too: JSON is parsed while Python's interpreter lock is held, and a running answer
waits for it (4 MB take about 40 ms).
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import AdapterError
from ...module_names import plain
from .patterns import check_quick

LARGE = 2 << 20  # bytes; no JSON of an adapter is as large
_GGUF = b"GGUF"
_REGEX_KEYS = ("rank_pattern", "alpha_pattern")  # their keys are regular expressions (PEFT)
_REGEX_TEXTS = ("target_modules", "exclude_modules", "layers_pattern", "target_parameters")


@dataclass(frozen=True)
class FileRules:
    """Which files are read, and how large they may be. The defaults are those for what comes over HTTP."""

    pickles: bool = False
    archives: bool = False
    total: int = 4 << 30  # bytes of one adapter
    json: int = 1 << 20  # bytes of one JSON file; a rank for each of 5,000 modules takes half of it
    nesting: int = 32
    header: int = 4 << 20  # bytes of a safetensors header: about 30,000 tensors
    tensors: int = 65_536  # in a GGUF file
    pairs: int = 4_096  # in a GGUF file
    trusted: bool = False  # from the command line: regular expressions are not tried beforehand


HTTP = FileRules()
LOCAL = FileRules(archives=True, trusted=True)


def check_files(folder: Path, names: Sequence[str], rules: FileRules) -> None:
    """Check the copies of an adapter's files. Raises AdapterError for what the rules do not let through."""
    patterns: list[str] = []
    keys: list[str] = []
    for name in names:
        if name.endswith(".json"):
            patterns += _patterns(_checked_json(folder / name, rules))
        else:
            keys += _checked_weights(folder / name, rules)
    regular_expressions = [pattern for pattern in patterns if not plain(pattern)]
    if regular_expressions and not rules.trusted:
        check_quick(regular_expressions, keys)


def _checked_json(path: Path, rules: FileRules) -> dict[str, Any]:
    from ...io.json_object import read_json

    size = path.stat().st_size
    if size > rules.json:
        raise AdapterError(f"{path} has {size:,} bytes; expected at most {rules.json:,}")
    values = read_json(path)
    level: list[Any] = [values]
    for _ in range(rules.nesting):
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return values
    raise AdapterError(f"{path}: its JSON is nested too deeply; expected at most {rules.nesting} levels")


def _inside(value: Any) -> list[Any]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [inner for inner in values if isinstance(inner, dict | list)]


def _patterns(values: Mapping[str, Any]) -> list[str]:
    """Return the texts of an adapter_config.json that are used as regular expressions."""
    found = [key for name in _REGEX_KEYS if isinstance(values.get(name), dict) for key in values[name]]
    texts = [value for name in _REGEX_TEXTS if isinstance(value := values.get(name), str)]
    return found + texts


def _checked_weights(path: Path, rules: FileRules) -> list[str]:
    """Check a file of tensors, and return the tensors' names where the header gives them."""
    from ...io.tensors import refuse_placeholder

    refuse_placeholder(path)
    with open(path, "rb") as file:
        length = _header_length(path, file, rules)
        file.seek(8)
        return [] if length is None else _names(path, file.read(length))


def check_large(path: Path, file: BinaryIO, rules: FileRules) -> None:
    """Check what a large file's first bytes show, before it is copied. Small ones are copied as quickly.

    path: what errors call it. file: open at any position, which is changed. Raises AdapterError.
    """
    size = file.seek(0, os.SEEK_END)
    if size < LARGE:
        return
    if path.suffix == ".json":
        raise AdapterError(f"{path} has {size:,} bytes; expected at most {rules.json:,}")
    _header_length(path, file, rules)


def _header_length(path: Path, file: BinaryIO, rules: FileRules) -> int | None:
    """Check a file of tensors by its first bytes. Return the length of a safetensors header, which begins at byte 8."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(24)
    if head[:4] == _GGUF:
        _check_gguf(path, head, rules)
        return None
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length <= size - 8:
        if length > rules.header:
            raise AdapterError(
                f"{path}: its header has {length:,} bytes; expected at most {rules.header:,}, as no adapter "
                "has more tensors than fit there"
            )
        return length
    if head[8:9] == b"{" and path.suffix == ".safetensors":
        raise AdapterError(
            f"{path} is cut short: its header has {length:,} bytes, and the file {size:,}\n"
            "  copy it again, or ask whoever made it"
        )
    if _is_archive(file):
        if not rules.archives:
            raise AdapterError(f"{path} is numpy's archive, which is not loaded over HTTP{_CONVERT}")
    elif path.suffix in (".safetensors", ".gguf", ".npz"):
        raise AdapterError(f"{path} is not a readable {path.suffix} file: its first bytes are not those of one")
    elif not rules.pickles:
        allow = ", or start the server with --allow-pickle" if rules.trusted else ""
        raise AdapterError(f"{path} is a pickle, which can hold code, and is not loaded here{_CONVERT}{allow}")
    return None


_CONVERT = "\n  expected safetensors or GGUF: write one with lorakit convert ADAPTER OUT"


def _check_gguf(path: Path, head: bytes, rules: FileRules) -> None:
    if len(head) < 24:
        raise AdapterError(f"{path} is not a readable GGUF file: it has {len(head)} bytes")
    tensors, pairs = struct.unpack("<QQ", head[8:])
    if tensors > rules.tensors or pairs > rules.pairs:
        raise AdapterError(
            f"{path} claims {tensors:,} tensors and {pairs:,} pairs; expected at most {rules.tensors:,} and "
            f"{rules.pairs:,}"
        )


def _names(path: Path, text: bytes) -> list[str]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not a readable safetensors file: its header is not JSON") from error
    return [name for name in header if name != "__metadata__"] if isinstance(header, dict) else []


def _is_archive(file: BinaryIO) -> bool:
    """Whether it is numpy's archive: torch's pickles are zip files too."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (OSError, ValueError, NotImplementedError, EOFError, struct.error, zipfile.BadZipFile):
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)
