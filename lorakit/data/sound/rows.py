"""Rows of sounds with what is said in them: {"audio": "a.wav", "text": "..."}.

A sound is a path, relative to the folder of the rows' file, or stored bytes ({"bytes", "path"}, as in Parquet).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError, did_you_mean, listing, not_the_file
from ..dataset import unused_columns
from ..parse import Row
from .resample import resample
from .wav import OTHERS, SUFFIX, conversion, read_wav

COLUMNS = ("audio", "text")
NAMED = 20  # sounds that cannot be used, in one error


@dataclass(frozen=True)
class SoundFile:
    """A sound that can be used. `content`: SHA-256 of its file; `seconds`: its length."""

    where: str
    content: str
    seconds: float
    read: Callable[[], bytes]

    def samples(self, rate: int) -> np.ndarray:
        """Return its samples at this rate: [n] float32. Raises DataError if the file has gone or has changed."""
        try:
            data = self.read()
        except OSError as error:
            raise DataError(f"{self.where}: cannot be read: {error.strerror or error}") from error
        sound = read_wav(data, self.where)
        return resample(sound.samples, sound.rate, rate)


@dataclass(frozen=True)
class SpokenRow:
    """A sound with its text, None where a row has none."""

    sound: SoundFile
    text: str | None
    row: Row


def is_spoken(row: Mapping[str, Any]) -> bool:
    """Whether a row of data is a sound with what is said in it."""
    audio = row.get("audio")
    named = isinstance(audio, str) and audio.lower().endswith((SUFFIX, *OTHERS))
    stored = isinstance(audio, Mapping) and {"bytes", "path"} <= audio.keys()
    return (named or stored) and isinstance(row.get("text"), str)


def read_spoken(
    rows: Sequence[Row], columns: Mapping[str, str], longest: float, needed: bool = True
) -> tuple[list[SpokenRow], dict[str, int]]:
    """Return the rows with their sounds checked, and notes.

    columns: {"audio" or "text": the file's name for it}; longest: seconds that the base hears; needed: whether each
    row must have a text. Raises DataError, naming them together, for sounds that cannot be used.
    """
    for name in columns:
        if name not in COLUMNS:
            raise DataError(
                f"columns: '{name}' is not a column of sounds{did_you_mean(name, COLUMNS)}\n"
                "  expected audio=NAME, text=NAME or both"
            )
    audio, text = (columns.get(name, name) for name in COLUMNS)
    made, errors = [], []
    for row in rows:
        found = row.values.get(audio)
        if found is None:
            near = did_you_mean(audio, row.values)
            raise DataError(
                f"{row.where}: no {audio}; columns found: {listing(row.values, 20) or 'none'}{near}\n"
                "  expected audio and text; or say which column is which: --columns audio=NAME,text=NAME"
            )
        said = row.values.get(text)
        if (said is not None or needed) and not (isinstance(said, str) and said.strip()):
            what = "empty" if isinstance(said, str) else f"{said!r}"
            raise DataError(f"{row.where}: its {text} is {what}; expected what is said in the sound")
        try:
            made.append(SpokenRow(_checked(row, found, longest), said, row))
        except DataError as error:
            errors.append(str(error).replace("\n", "\n  "))
    if errors:
        lines = "".join(f"\n  {error}" for error in errors[:NAMED])
        more = f"\n  and {len(errors) - NAMED} more" if len(errors) > NAMED else ""
        raise DataError(f"{rows[0].file}: {len(errors)} of {len(rows)} sounds cannot be used:{lines}{more}")
    unread = [[n for n, value in row.values.items() if value is not None and n not in (audio, text)] for row in rows]
    return made, unused_columns(unread)


def _checked(row: Row, found: Any, longest: float) -> SoundFile:
    where, read, path = _opened(row, found)
    if Path(where).suffix.lower() in OTHERS:
        raise DataError(f"{where}: only WAV files are read\n  {conversion(where)}")
    try:
        data = read()
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error.strerror or error}") from error
    stands_in = not_the_file(path) if path is not None else None
    if stands_in is not None:
        raise DataError(stands_in)
    sound = read_wav(data, where)
    if sound.seconds > longest:
        raise DataError(
            f"{where}: {sound.seconds:.1f} s long, and the base hears {longest:g} s at once\n"
            "  cut it into pieces, each with its own text"
        )
    return SoundFile(where, hashlib.sha256(data).hexdigest(), sound.seconds, read)


def _opened(row: Row, found: Any) -> tuple[str, Callable[[], bytes], Path | None]:
    """Return what names the sound, what reads its bytes, and its file."""
    if isinstance(found, Mapping) and found.get("bytes") is not None:
        data = bytes(found["bytes"])
        return f"{row.where}: {found.get('path') or 'a sound'}", lambda: data, None
    name = found.get("path") if isinstance(found, Mapping) else found
    if not isinstance(name, str) or not name:
        raise DataError(f"{row.where}: its sound is {str(found)[:60]!r}; expected the path of a WAV file")
    folder = Path(row.file).parent if Path(row.file).is_file() else Path()
    path = Path(name) if Path(name).is_absolute() else folder / name
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{row.where}: there is no sound '{name}' in {folder}{did_you_mean(path.name, siblings)}")
    return f"{row.where}: {name}", path.read_bytes, path
