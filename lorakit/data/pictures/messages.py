"""Rows of conversations with pictures: which pictures a row has, in order, and its turns with a bare part for each.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "..."}]},
                  {"role": "assistant", "content": "..."}]}
    {"images": ["a.png"], "messages": [...]}     for parts {"type": "image"} without a path, or "<image>" in a text
    {"image": "a.png", "prompt": "...", "completion": "..."}      the picture before the prompt; also "images": [...]

A picture is a path, relative to the folder of the rows' file, or stored bytes ({"bytes", "path"}, as in Parquet).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import DataError, did_you_mean, listing
from ..parse import Row
from .decode import SUFFIXES
from .found import Found

PICTURE = "image"  # the type of a picture's part, as chat templates know it
COLUMNS = ("messages", "prompt", "completion", "image", "images", "system")
PLACE = "<image>"  # where a text has a picture, in rows with a column of them (LLaMA-Factory's and LLaVA's data)
_PARTS = ("image", "image_url", "input_image")
EXPECTED = "messages with pictures in them, or image (images), prompt and completion"


def has_picture(row: Mapping[str, Any]) -> bool:
    """Whether a row of data is a conversation with a picture in it. A picture in a column beside messages that have no
    place for it, such as a cover, is none.
    """
    given = [row.get(name) for name in ("image", "images")]
    in_columns = [each for value in given for each in (value if isinstance(value, list) else [value])]
    has_column = any(map(_is_picture, in_columns))
    turns = row.get("messages")
    contents = [turn.get("content") for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    if has_column and turns is None and {"prompt", "completion"} <= row.keys():
        return True
    if has_column and any(isinstance(content, str) and PLACE in content for content in contents):
        return True
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, Mapping) and part.get("type") in _PARTS for part in parts)


def with_pictures(row: Row, columns: Mapping[str, str]) -> tuple[Row, list[Found]]:
    """Return the row as messages whose pictures are bare parts ({"type": "image"}), and the pictures in their order.

    columns: our column name -> the file's. Raises DataError, naming the row.
    """
    values = _renamed(row, columns)
    column = values.pop("images", values.pop("image", None))
    given = [] if column is None else column if isinstance(column, list) else [column]
    if "messages" not in values:
        values = _as_messages(row, values, len(given))
    waiting = [_found(row, each) for each in given]
    turns, pictures = values["messages"], list[Found]()
    if not isinstance(turns, list):
        return replace(row, values=values), []  # `turns.conversation` says what is wrong with it
    made = []
    for turn in turns:
        content = turn.get("content") if isinstance(turn, dict) else None
        if isinstance(content, str) and PLACE in content and waiting:
            content = _parts_of(content)
        if isinstance(content, list):
            content = [_part(row, part, waiting, pictures) for part in content]
            turn = {**turn, "content": content}
        made.append(turn)
    if waiting:
        raise DataError(
            f"{row.where}: {len(given)} pictures, and its messages have {len(given) - len(waiting)} places for them\n"
            f'  put a part {{"type": "image"}}, or {PLACE} in a text, where each belongs'
        )
    return replace(row, values=values | {"messages": made}), pictures


def _renamed(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            raise DataError(
                f"columns: '{ours}' is not a column of rows with pictures{did_you_mean(ours, COLUMNS)}\n"
                f"  known: {', '.join(COLUMNS)}"
            )
        if theirs not in row.values and ours != "completion":
            raise DataError(
                f"{row.where}: no column '{theirs}' (columns: {ours}: {theirs}){did_you_mean(theirs, row.values)}"
            )
    mapped = set(columns.values())
    values = {name: value for name, value in row.values.items() if name not in mapped}
    values |= {ours: row.values.get(theirs) for ours, theirs in columns.items()}
    return {name: value for name, value in values.items() if value is not None}


def _as_messages(row: Row, values: dict[str, Any], count: int) -> dict[str, Any]:
    prompt, completion = values.pop("prompt", None), values.pop("completion", None)
    if not isinstance(prompt, str) or not count:
        raise DataError(
            f"{row.where}: no messages, and no {'picture' if isinstance(prompt, str) else 'prompt'}; columns found: "
            f"{listing(row.values, 20) or 'none'}\n  expected {EXPECTED}"
        )
    parts: list[Any] = [{"type": PICTURE}] * count
    turns: list[dict[str, Any]] = [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]
    if completion is not None:
        turns.append({"role": "assistant", "content": completion})
    return values | {"messages": turns}


def _parts_of(text: str) -> list[dict[str, Any]]:
    """Return a text as parts, with a picture wherever it says `PLACE`."""
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split(PLACE)):
        if number:
            parts.append({"type": PICTURE})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _part(row: Row, part: Any, waiting: list[Found], pictures: list[Found]) -> Any:
    """Return a part, a picture's without its path. Its picture, or else the next one of `waiting`, is appended to
    `pictures`.
    """
    if not isinstance(part, dict) or part.get("type") not in _PARTS:
        return part
    source = next((part[key] for key in ("image", "path", "url", "image_url") if part.get(key) is not None), None)
    if isinstance(source, Mapping) and "url" in source:
        source = source["url"]
    if source is None:
        if not waiting:
            raise DataError(
                f"{row.where}: a part of type {part['type']} names no picture, and the row has no more of them\n"
                '  give its path, {"type": "image", "image": "a.png"}, or a column images with one for each part'
            )
        pictures.append(waiting.pop(0))
    else:
        pictures.append(_found(row, source))
    return {"type": PICTURE}


def _is_picture(value: Any) -> bool:
    stored = isinstance(value, Mapping) and {"bytes", "path"} <= value.keys()
    return stored or (isinstance(value, str) and value.lower().endswith(SUFFIXES))


def _found(row: Row, source: Any) -> Found:
    if isinstance(source, Mapping) and source.get("bytes") is not None:
        data = source["bytes"]
        return Found(f"{row.where}: {source.get('path') or 'a picture'}", "", "", lambda: bytes(data), None)
    name = source.get("path") if isinstance(source, Mapping) else source
    if not isinstance(name, str) or not name:
        raise DataError(f"{row.where}: a picture is {str(source)[:60]!r}; expected a path")
    if name.startswith(("http://", "https://", "data:")):
        raise DataError(
            f"{row.where}: the picture {name[:60]} is an address; pictures are read from files\n  download it"
        )
    folder = Path(row.file).parent if Path(row.file).is_file() else Path()
    path = Path(name.removeprefix("file://"))
    path = path if path.is_absolute() else folder / path
    if not path.is_file():
        siblings: Sequence[str] = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{row.where}: there is no picture '{name}' in {folder}{did_you_mean(path.name, siblings)}")
    return Found(f"{row.where}: {name}", "", path.stem, path.read_bytes, None, path)
