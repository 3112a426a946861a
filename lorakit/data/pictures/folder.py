"""The pictures of a folder and of the folders in it, with captions in files beside them or in a metadata file.

    cats/a.png   cats/a.txt or cats/a.caption                        one caption a picture
    cats/metadata.jsonl   {"file_name": "a.png", "text": "..."}      see `metadata`

Hidden files are skipped. Every other file is used, or named in a note.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from ...errors import DataError, listing
from ..parse import decode as decode_text
from .decode import SUFFIXES, UNREADABLE
from .found import Found, Source
from .metadata import captions_in, check_columns, is_metadata

CAPTION_SUFFIXES = (".txt", ".caption")
EXPECTED = "a .txt or .caption file beside each, or a row in metadata.jsonl"


def pictures_below(folder: Path, leave_out: Collection[Path] = ()) -> list[Path]:
    """List the pictures of a folder and of those in it, sorted by path. `leave_out`: folders of something else."""
    return [path for path in _files_below(folder, leave_out) if _is_picture(path)]


def read_folder(
    folder: Path,
    columns: Mapping[str, str] | None = None,
    leave_out: Collection[Path] = (),
    metadata: Path | None = None,
) -> Source:
    """Return the pictures of a folder with their captions; `leave_out`: folders in it that hold something else.

    `metadata`: the only file to read captions from, whose pictures alone are used. Raises DataError.
    """
    columns = columns or {}
    check_columns(columns)
    files = _files_below(folder, leave_out)
    pictures = [path for path in files if _is_picture(path)]
    if not pictures:
        contents = listing(str(path.relative_to(folder)) for path in files) or "nothing"
        raise DataError(
            f"{folder}: no pictures in this folder; it contains: {contents}\n"
            f"  expected files named {', '.join(SUFFIXES)}"
        )
    listed: dict[Path, str] = {}
    notes: dict[str, int] = {}
    metadata_files = [path for path in files if is_metadata(path)] if metadata is None else [metadata]
    for path in metadata_files:
        captions, of_file = captions_in(path, set(pictures), columns)
        listed |= captions
        notes |= {f"{path.name}: {note}": count for note, count in of_file.items()}
    beside: dict[Path, list[Path]] = {}
    if metadata is None:
        beside = _caption_files(files, pictures)
        notes |= _of_caption_files(files, pictures, beside, listed, folder)
        notes |= _unknown(files, pictures, metadata_files, folder)
    else:
        pictures = [path for path in pictures if path in listed]
    found = [_found(path, folder, listed.get(path), beside.get(path, [])) for path in pictures]
    tables = [path.name for path in files if path.suffix.lower() in (".jsonl", ".csv") and path not in metadata_files]
    hint = (
        f"; {tables[0]} is not read: name it metadata{Path(tables[0]).suffix}, or give it as the data" if tables else ""
    )
    return Source(str(folder), found, notes, EXPECTED + hint)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in (*SUFFIXES, *UNREADABLE)


def _files_below(folder: Path, leave_out: Collection[Path]) -> list[Path]:
    away = {folder.resolve(), *(path.resolve() for path in leave_out)}  # a link may lead back here
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in ("Thumbs.db", "desktop.ini", "__MACOSX"):
            continue
        if path.is_dir():
            if path.resolve() not in away:
                found += _files_below(path, away)
        else:
            found.append(path)
    return found


def _caption_files(files: list[Path], pictures: list[Path]) -> dict[Path, list[Path]]:
    """The caption files of each picture: its name with another suffix, or with one more (a.png.txt)."""
    texts: dict[tuple[Path, str], list[Path]] = {}
    for path in files:
        if path.suffix.lower() in CAPTION_SUFFIXES:
            texts.setdefault((path.parent, path.stem), []).append(path)
    return {
        path: [*texts.get((path.parent, path.stem), ()), *texts.get((path.parent, path.name), ())] for path in pictures
    }


def _found(path: Path, folder: Path, listed: str | None, texts: list[Path]) -> Found:
    relative = path.relative_to(folder)
    caption = listed
    if caption is None and texts:
        read = {text: _caption(text) for text in texts}
        if len(set(read.values())) > 1:
            names = " and ".join(text.name for text in texts)
            raise DataError(f"{path} has two captions that differ, in {names}\n  remove one of the files")
        caption = read[texts[0]]
    parent = "" if relative.parent == Path() else str(relative.parent)
    return Found(str(path), parent, str(relative.with_suffix("")), path.read_bytes, caption, path)


def _caption(path: Path) -> str | None:
    """A caption file's text in one line; None if it is blank. Raises DataError if it is not UTF-8."""
    try:
        return " ".join(decode_text(path.read_bytes(), str(path)).split()) or None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _of_caption_files(
    files: list[Path], pictures: list[Path], beside: Mapping[Path, list[Path]], listed: Mapping[Path, str], folder: Path
) -> dict[str, int]:
    texts = [path for path in files if path.suffix.lower() in CAPTION_SUFFIXES]
    used = {text for several in beside.values() for text in several}
    alone = [str(text.relative_to(folder)) for text in texts if text not in used]
    both = [str(path.relative_to(folder)) for path in pictures if path in listed and beside[path]]
    notes = {}
    if alone:
        notes[f"caption files without a picture, not used: {listing(alone)}"] = len(alone)
    if both:
        notes[f"with a caption in the metadata file and one beside, which is not used: {listing(both)}"] = len(both)
    return notes


def _unknown(files: list[Path], pictures: list[Path], metadata: list[Path], folder: Path) -> dict[str, int]:
    known = {*pictures, *metadata}
    others = [p for p in files if p not in known and p.suffix.lower() not in CAPTION_SUFFIXES]
    if not others:
        return {}
    names = listing(str(path.relative_to(folder)) for path in others)
    return {f"files that are neither picture nor caption: {names}": len(others)}
