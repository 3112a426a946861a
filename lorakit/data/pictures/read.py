"""Read pictures into items: give each a caption, a bucket and a mask, and say what was done."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import DataError, did_you_mean, listing
from . import summary
from .buckets import Grid, buckets_of
from .captions import with_trigger
from .check import check_pictures
from .decode import colour
from .find import find
from .found import Found, Source
from .item import Chances, Mask, PictureItem
from .masks import ALPHA, read_masks
from .settings import PictureSettings
from .summary import Folder

# Kohya's folder names. No more than three digits: 2024_holiday is a year.
REPEATS = re.compile(r"(?P<times>[1-9]\d{0,2})_(?P<name>.+)")
FOLDERS = 10  # that an error lists


@dataclass(frozen=True)
class PictureData:
    """The items and what to say about them. Prior items, if any, follow the others.

    `shape`, `length`: descriptions for the start panel; `notes`: message -> number of files it concerns; `about`:
    stored in the result's metadata; `grid`: the sizes that buckets were chosen from.
    """

    items: list[PictureItem]
    shape: str
    length: str
    notes: dict[str, int]
    about: dict[str, Any]
    grid: Grid
    folders: list[Folder]

    @property
    def pictures(self) -> list[PictureItem]:
        """Each picture once, without its repeats."""
        return [item for item in self.items if not item.repeat]


def read_pictures(
    source: str | Path,
    settings: PictureSettings,
    *,
    resolution: int = 512,
    multiple: int = 8,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    leave_out: Sequence[str] = (),
    on_picture: Callable[[int, int], None] | None = None,
) -> PictureData:
    """Read the pictures of a folder, a metadata file or a data set, and those of `settings.prior_data`.

    resolution: the pipeline's own, for 'auto'; multiple: of which it needs sides to be multiples; leave_out: folders
    that may be in the source's and are not read, beside those of `other_folders`; on_picture: called with (pictures
    checked, all). Raises DataError for pictures that are broken, have no caption or no mask, naming
    them; ConfigError for settings that contradict the data.
    """
    grid = Grid.of(settings, resolution, multiple)
    away = [Path(name).expanduser() for name in (*other_folders(settings), *leave_out)]
    sources = [find(source, split, columns, away)]
    if settings.prior_data is not None:
        sources.append(find(settings.prior_data, None, columns))
    items: list[PictureItem] = []
    folders: list[Folder] = []
    notes: dict[str, int] = {}
    for number, each in enumerate(sources):
        is_prior = number > 0
        of_source, of_folders, found_notes = _items(each, settings, grid, is_prior, on_picture)
        items += of_source
        folders += of_folders
        notes |= {f"prior: {note}" if is_prior else note: count for note, count in found_notes.items()}
    return PictureData(
        items=items,
        shape=summary.shape(items, folders),
        length=summary.length(items, grid),
        notes=notes,
        about=summary.about(items, settings.trigger),
        grid=grid,
        folders=folders,
    )


def other_folders(settings: PictureSettings) -> list[str]:
    """Return the folders of the settings that hold masks and pictures of the class."""
    return [name for name in (settings.prior_data, settings.mask) if name is not None and name != ALPHA]


def held_out_of(
    items: Sequence[PictureItem], share: float, seed: int = 0
) -> tuple[list[PictureItem], list[PictureItem]]:
    """Split into (train, held out), both in order. All items of one picture stay together; prior items are trained.

    A held-out picture is evaluated once, however often an epoch would have it. Raises DataError where fewer than two
    pictures differ.
    """
    if not share:
        return list(items), []
    contents = list(dict.fromkeys(item.content for item in items if not item.is_prior))
    if len(contents) < 2:
        raise DataError(
            "nothing can be held out for validation: there is only one picture\n"
            "  give separate pictures (--validation FOLDER), or turn validation off (--validation 0)"
        )
    # By hash, so that adding a picture does not move the others between training and validation.
    order = sorted(contents, key=lambda content: hashlib.sha256(f"{seed}/{content}".encode()).digest())
    chosen = set(order[: min(len(contents) - 1, max(1, round(share * len(contents))))])
    train = [item for item in items if item.is_prior or item.content not in chosen]
    return train, [item for item in items if item.content in chosen and not item.is_prior and not item.repeat]


def _items(
    source: Source, settings: PictureSettings, grid: Grid, is_prior: bool, on_picture: Callable[[int, int], None] | None
) -> tuple[list[PictureItem], list[Folder], dict[str, int]]:
    """The items of a source, its folders' counts, and notes."""
    background = colour(settings.background)
    checked, notes = check_pictures(source, settings, background, on_picture)
    notes = source.notes | notes
    found = [one.found for one in checked]
    captions = _captions(source, found, settings, is_prior, notes)
    buckets = buckets_of([one.size for one in checked], [one.where for one in checked], grid)
    masks: Sequence[Mask | None] = [None] * len(checked)
    if settings.mask is not None and not is_prior:
        masks = read_masks(settings.mask, checked, notes)
    repeats = _repeats(source, {} if is_prior else settings.repeats, notes)
    trigger = None if is_prior else settings.trigger
    chances = Chances(
        settings.flip, settings.crop, settings.caption_dropout, settings.shuffle_tags, settings.keep_tags, trigger
    )
    items = []
    for one, caption, bucket, mask in zip(checked, captions, buckets, masks, strict=True):
        item = PictureItem(
            where=one.where,
            caption=with_trigger(caption, trigger),
            group=bucket,
            original=one.size,
            content=one.content,
            read=one.found.read,
            chances=chances,
            is_prior=is_prior,
            mask=mask,
            background=background,
            animated=settings.animated,
        )
        items += [replace(item, repeat=repeat) for repeat in range(repeats[one.found.folder])]
    counts = Counter(one.folder for one in found)
    captioned = Counter(one.folder for one in found if one.caption is not None)
    folders = [
        Folder(_name(source, folder), count, captioned[folder], repeats[folder], is_prior)
        for folder, count in counts.items()
    ]
    return items, folders, notes | summary.notes_on(items, grid)


def _captions(
    source: Source, found: list[Found], settings: PictureSettings, is_prior: bool, notes: dict[str, int]
) -> list[str]:
    """The captions. Raises DataError, naming them with their count, for pictures that have none."""
    default, option, example = settings.caption, "--caption", "a photo of sks dog"
    if is_prior:
        default, option, example = settings.prior_caption, "--prior-caption", "a photo of a dog"
    missing = [one for one in found if one.caption is None]
    if missing and default is None:
        names = listing(one.where for one in missing)
        lines = [f"{source.name}: {len(missing)} of {len(found)} pictures have no caption: {names}"]
        lines += _counts(source, found, missing)
        lines.append(f"  expected {source.expected}{_kohya_caption(missing)}")
        lines.append(f"  or give those without one the same caption: {option} '{example}'")
        raise DataError("\n".join(lines))
    if missing:
        notes[f"without a caption of their own, get '{default}'"] = len(missing)
    return [default or "" if one.caption is None else one.caption for one in found]


def _counts(source: Source, found: Sequence[Found], missing: Sequence[Found]) -> list[str]:
    """Lines with the counts of folders that lack captions, if there are several folders."""
    pictures, lacking = Counter(one.folder for one in found), Counter(one.folder for one in missing)
    if len(pictures) == 1:
        return []
    lines = [
        f"  {_name(source, folder)}: {pictures[folder]:,} pictures, {pictures[folder] - count:,} captions"
        for folder, count in lacking.items()
    ]
    return [*lines[:FOLDERS], *([f"  and {len(lines) - FOLDERS} more folders"] if len(lines) > FOLDERS else [])]


def _kohya_caption(missing: Sequence[Found]) -> str:
    """Say what kohya's trainer takes for a caption where there is none: the folder's name."""
    named = next((match for one in missing if (match := REPEATS.fullmatch(Path(one.folder).name))), None)
    return f" (kohya's trainer would take the folder's name, '{named['name']}')" if named else ""


def _repeats(source: Source, given: Mapping[str, int], notes: dict[str, int]) -> dict[str, int]:
    """How often an epoch has each folder's pictures: as given, or as its name says (kohya's 10_name)."""
    counts = Counter(found.folder for found in source.pictures)
    names = {folder: (folder, Path(_name(source, folder)).name) for folder in counts}
    every = list(dict.fromkeys(name for both in names.values() for name in both if name))
    for name in given:
        if name not in every:
            raise DataError(
                f"repeats: '{name}' is no folder with pictures in {source.name}{did_you_mean(name, every)}\n"
                f"  folders: {listing(every, 20)}"
            )
    repeats = {}
    for folder, both in names.items():
        named = REPEATS.fullmatch(both[1])
        asked = next((given[name] for name in both if name in given), None)
        repeats[folder] = asked or (int(named["times"]) if named else 1)
        if named and asked is None and repeats[folder] > 1:
            note = f"seen {repeats[folder]} times an epoch, as their folder's name says: {both[1]}"
            notes[note] = counts[folder]
    return repeats


def _name(source: Source, folder: str) -> str:
    return str(Path(source.name) / folder) if folder else source.name
