"""Read pictures into items: check every file, give each a caption and a bucket, and say what was done.

Every picture is decoded once before training, so that all broken ones are named at the start, with their count.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...errors import DataError, did_you_mean, listing, not_the_file
from .buckets import CROPPED_MUCH, Grid, Size, buckets_of
from .captions import with_trigger
from .decode import colour, decode, require_pillow
from .find import find
from .found import Found, Source
from .item import Chances, Mask, PictureItem
from .masks import ALPHA, read_masks
from .settings import PictureSettings

# Decoding releases Python's lock. More threads than this would only hold more decoded pictures in memory.
THREADS = 4
# Kohya's folder names. No more than three digits: 2024_holiday is a year.
REPEATS = re.compile(r"(?P<times>[1-9]\d{0,2})_(?P<name>.+)")
SHOWN_CAPTIONS = 3


@dataclass(frozen=True)
class Folder:
    """A folder's counts. `captions`: pictures with one of their own; `repeats`: how often an epoch has each."""

    name: str
    pictures: int
    captions: int
    repeats: int
    is_prior: bool = False


@dataclass(frozen=True)
class PictureData:
    """The items and what to say about them. Prior items, if any, follow the others in `items`.

    `shape`, `length`: descriptions for the start panel; `notes`: message -> number of pictures it concerns; `about`:
    stored in the result's metadata.
    """

    items: list[PictureItem]
    shape: str
    length: str
    notes: dict[str, int]
    about: dict[str, Any]
    grid: Grid
    folders: list[Folder] = field(default_factory=list)

    @property
    def pictures(self) -> list[PictureItem]:
        """Each picture once, without its repeats."""
        return [item for item in self.items if not item.repeat]


@dataclass(frozen=True)
class _Checked:
    found: Found
    content: str = ""
    size: Size = (0, 0)
    has_alpha: bool = False
    notes: tuple[str, ...] = ()
    error: str | None = None


def read_pictures(
    source: str | Path,
    settings: PictureSettings,
    *,
    resolution: int = 512,
    multiple: int = 8,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    on_picture: Callable[[int, int], None] | None = None,
) -> PictureData:
    """Read the pictures of a folder, a metadata file or a data set, and those of `settings.prior_data`.

    resolution: the pipeline's own, for 'auto'; multiple: of which it needs sides to be multiples; on_picture: called
    with (pictures checked, all). Raises DataError for pictures that are broken, have no caption or no mask, naming
    them; ConfigError for settings that contradict the data; LorakitError if Pillow is missing.
    """
    require_pillow()
    grid = Grid.of(settings, resolution, multiple)
    background = colour(settings.background)
    elsewhere = [name for name in (settings.prior_data, settings.mask) if name not in (None, ALPHA)]
    leave_out = [Path(str(name)).expanduser() for name in elsewhere]
    own = find(source, split, columns, leave_out)
    read = _Reader(settings, grid, background, on_picture)
    items, folders, notes = read.items(own, is_prior=False)
    if settings.prior_data is not None:
        of_prior, prior_folders, prior_notes = read.items(find(settings.prior_data, None, columns), is_prior=True)
        items, folders = items + of_prior, folders + prior_folders
        notes |= {f"prior: {note}": count for note, count in prior_notes.items()}
    return PictureData(
        items=items,
        shape=_shape(items, folders),
        length=_length(items, grid),
        notes=notes,
        about=_about(items, settings),
        grid=grid,
        folders=folders,
    )


def held_out_of(
    items: Sequence[PictureItem], share: float, seed: int = 0
) -> tuple[list[PictureItem], list[PictureItem]]:
    """Split into (train, held out), both in order. All items of one picture stay together; prior items are trained.

    Raises DataError where fewer than two pictures differ.
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
    count = min(len(contents) - 1, max(1, round(share * len(contents))))
    chosen = set(order[:count])
    held = [item for item in items if item.content in chosen and not item.is_prior]
    # A held-out picture is evaluated once, however often an epoch would have it.
    train = [item for item in items if item.is_prior or item.content not in chosen]
    return train, [item for item in held if not item.repeat]


@dataclass(frozen=True)
class _Reader:
    settings: PictureSettings
    grid: Grid
    background: tuple[int, int, int]
    on_picture: Callable[[int, int], None] | None

    def items(self, source: Source, is_prior: bool) -> tuple[list[PictureItem], list[Folder], dict[str, int]]:
        """The items of a source, its folders' counts, and notes."""
        settings = self.settings
        notes = dict(source.notes)
        checked = self._checked(source, notes)
        captions = self._captions(source, [one.found for one in checked], is_prior, notes)
        buckets = buckets_of([one.size for one in checked], [one.found.where for one in checked], self.grid)
        masks: Sequence[Mask | None] = [None] * len(checked)
        if settings.mask is not None and not is_prior:
            alphas = [one.has_alpha for one in checked]
            masks = read_masks(
                settings.mask, [one.found for one in checked], [one.size for one in checked], alphas, notes
            )
        times = self._repeats(source, is_prior, notes)
        trigger = None if is_prior else settings.trigger
        chances = Chances(
            settings.flip, settings.crop, settings.caption_dropout, settings.shuffle_tags, settings.keep_tags, trigger
        )
        items = []
        for one, caption, bucket, mask in zip(checked, captions, buckets, masks, strict=True):
            item = PictureItem(
                where=one.found.where,
                caption=with_trigger(caption, trigger),
                group=bucket,
                original=one.size,
                content=one.content,
                read=one.found.read,
                chances=chances,
                is_prior=is_prior,
                mask=mask,
                background=self.background,
                animated=settings.animated,
            )
            items += [replace(item, repeat=repeat) for repeat in range(times[one.found.folder])]
        notes |= _notes(checked, items, self.grid, settings)
        counts = Counter(found.folder for found in source.pictures)
        captioned = Counter(found.folder for found in source.pictures if found.caption is not None)
        folders = [
            Folder(_folder_name(source, folder), count, captioned[folder], times[folder], is_prior)
            for folder, count in counts.items()
        ]
        return items, folders, notes

    def _checked(self, source: Source, notes: dict[str, int]) -> list[_Checked]:
        """Decode each picture once. Raises DataError, naming the broken ones with their count, or notes them."""
        checked = []
        with ThreadPoolExecutor(THREADS) as pool:
            for one in pool.map(self._check, source.pictures):
                checked.append(one)
                if self.on_picture is not None:
                    self.on_picture(len(checked), len(source.pictures))
        broken = [one for one in checked if one.error is not None]
        good = [one for one in checked if one.error is None]
        if broken and (self.settings.broken == "refuse" or not good):
            lines = "\n".join(f"  {one.error}" for one in broken[:20])
            more = f"\n  and {len(broken) - 20} more" if len(broken) > 20 else ""
            fix = "remove or replace them, or leave them out: --broken skip"
            count = f"{len(broken)} of {len(checked)} pictures cannot be used"
            raise DataError(f"{source.name}: {count}:\n{lines}{more}\n  {fix}")
        if broken:
            notes[f"broken, left out: {listing(one.found.where for one in broken)}"] = len(broken)
        for note, count in Counter(note for one in good for note in one.notes).items():
            notes[note] = count
        return good

    def _check(self, found: Found) -> _Checked:
        try:
            data = found.read()
            decoded = decode(data, found.where, self.background, self.settings.animated)
        except OSError as error:
            return _Checked(found, error=f"{found.where}: cannot be read: {error.strerror or error}")
        except DataError as error:
            stands_in = not_the_file(found.path) if found.path is not None else None
            return _Checked(found, error=(stands_in or str(error)).replace("\n", "\n  "))
        content = hashlib.sha256(data).hexdigest()
        return _Checked(found, content, decoded.rgb.size, decoded.alpha is not None, decoded.notes)

    def _captions(self, source: Source, found: list[Found], is_prior: bool, notes: dict[str, int]) -> list[str]:
        """The captions. Raises DataError, naming them with their count, for pictures that have none."""
        default, option = self.settings.caption, "--caption"
        if is_prior:
            default, option = self.settings.prior_caption, "--prior-caption"
        missing = [one for one in found if one.caption is None]
        if missing and default is None:
            count = f"{len(missing)} of {len(found)} pictures have no caption"
            names = listing(one.where for one in missing)
            raise DataError(
                f"{source.name}: {count}: {names}\n  expected {source.expected}{_hint(missing)}\n"
                f"  or give those without one the same caption: {option} 'a photo of sks dog'"
            )
        if missing:
            notes[f"without a caption of their own, get '{default}'"] = len(missing)
        return [default or "" if one.caption is None else one.caption for one in found]

    def _repeats(self, source: Source, is_prior: bool, notes: dict[str, int]) -> dict[str, int]:
        """How often an epoch has each folder's pictures: as set, or as its name says (kohya's 10_name)."""
        folders = list(dict.fromkeys(found.folder for found in source.pictures))
        given = {} if is_prior else self.settings.repeats
        known = {folder: [folder, Path(folder).name or Path(source.name).name] for folder in folders}
        times = {}
        for name in given:
            if not any(name in names for names in known.values()):
                every = [each for names in known.values() for each in names if each]
                raise DataError(
                    f"repeats: '{name}' is no folder of {source.name}{did_you_mean(name, every)}\n"
                    f"  folders with pictures: {listing(every, 20)}"
                )
        counts = Counter(found.folder for found in source.pictures)
        for folder, names in known.items():
            named = REPEATS.fullmatch(names[1])
            set_to = next((given[name] for name in names if name in given), None)
            times[folder] = set_to if set_to is not None else int(named["times"]) if named else 1
            if named and set_to is None and times[folder] > 1:
                notes[f"seen {times[folder]} times an epoch, as their folder's name says: {names[1]}"] = counts[folder]
        return times


def _folder_name(source: Source, folder: str) -> str:
    return str(Path(source.name) / folder) if folder else source.name


def _hint(missing: Sequence[Found]) -> str:
    """What kohya's trainer takes for a caption where there is none: the folder's name."""
    for one in missing:
        named = REPEATS.fullmatch(Path(one.folder).name)
        if named:
            return f" (kohya's trainer would take the folder's name, '{named['name']}')"
    return ""


def _notes(
    checked: Sequence[_Checked], items: Sequence[PictureItem], grid: Grid, settings: PictureSettings
) -> dict[str, int]:
    """What the user should know of the pictures: repeated ones, much cropped ones, small ones."""
    notes: dict[str, int] = {}
    first: dict[str, str] = {}
    same = []
    for one in checked:
        other = first.setdefault(one.content, one.found.where)
        if other != one.found.where:
            same.append(f"{Path(one.found.where).name} = {Path(other).name}")
    if same:
        notes[f"the same file as an earlier one: {listing(same)}"] = len(same)
    pictures = [item for item in items if not item.repeat]
    much = sorted((item for item in pictures if item.cropped > CROPPED_MUCH), key=lambda item: -item.cropped)
    if much:
        names = listing(f"{Path(item.where).name} ({item.cropped:.0%})" for item in much)
        notes[f"more than {CROPPED_MUCH:.0%} is cropped away: {names}; lorakit data show draws the crops"] = len(much)
    full = set(grid.sizes())
    small = [item for item in pictures if item.group not in full]
    if small:
        names = listing(f"{Path(item.where).name} ({item.group[0]}x{item.group[1]})" for item in small)
        note = f"smaller than resolution {grid.resolution}, trained at their own size: {names}"
        notes[f"{note} (--upscale: enlarge them)"] = len(small)
    if settings.shuffle_tags and not any("," in item.caption for item in pictures):
        notes["shuffle_tags has no effect: no caption has a comma"] = len(pictures)
    return notes


def _shape(items: Sequence[PictureItem], folders: Sequence[Folder]) -> str:
    """How many pictures and captions each folder has, and the first captions."""
    parts = [f"{f.name}: {f.pictures:,} pictures, {f.captions:,} captions" for f in folders]
    captions = list(dict.fromkeys(item.caption for item in items if not item.is_prior and not item.repeat))
    shown = " · ".join(f"'{caption}'" for caption in captions[:SHOWN_CAPTIONS])
    return f"{listing(parts)}; captions: {shown}{' ...' * (len(captions) > SHOWN_CAPTIONS)}"


def _length(items: Sequence[PictureItem], grid: Grid) -> str:
    """The buckets and their pictures."""
    counts = Counter(item.group for item in items if not item.repeat)
    shown = listing((f"{w}x{h}: {count:,}" for (w, h), count in counts.most_common()), 6)
    return f"resolution {grid.resolution}; {len(counts)} bucket{'s' * (len(counts) > 1)}, {shown}"


def _about(items: Sequence[PictureItem], settings: PictureSettings) -> dict[str, Any]:
    """What the result's metadata says of the data: counts, the trigger word, how often each part of captions occurs."""
    own = [item for item in items if not item.is_prior]
    tags = Counter(tag.strip() for item in own if not item.repeat for tag in item.caption.split(",") if tag.strip())
    return {
        "pictures": sum(not item.repeat for item in own),
        "items": len(own),
        "prior": sum(item.is_prior and not item.repeat for item in items),
        "trigger": settings.trigger,
        "tags": dict(tags.most_common(1000)),
        "buckets": {f"{w}x{h}": count for (w, h), count in Counter(item.group for item in own).items()},
    }
