"""Read a causal language model's data sets into items: one or several, in memory or in a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from ...config import RunSettings, Strict
from ...errors import DataError
from ..task import Data
from .held_out import held_out_notes
from .lengths import described


class Sources(Strict):
    """Which rows a run has besides those of `data`, and where they are kept."""

    rows: ClassVar = {"mix"}
    free: ClassVar = {"streaming"}  # the same items, wherever they are

    mix: dict[str, float] = Field(
        default_factory=dict,
        description="other data to mix in, each with its share of the rows: {chat.jsonl: 0.3}; the rest is data's",
    )
    streaming: bool = Field(
        False, description="read rows one by one and keep their tokens on disk: for data larger than memory"
    )

    @field_validator("mix")
    @classmethod
    def _shares(cls, value: dict[str, float]) -> dict[str, float]:
        from ...data.mixing import check_shares

        check_shares(value)
        return value


def read_data(
    config: RunSettings,
    sources: Sources,
    max_length: int | Literal["auto"],
    how: Mapping[str, Any],
    tokenizer: Any,
    answer_after: str | None = None,
) -> tuple[Data, Any]:
    """Return the items of all data sets, training and held out, and the first one's `Dataset`.

    `how`: the arguments of `data.dataset.build` that all data sets share; `answer_after`: see `data.split_text`. The
    length limit `auto` is that of the first.
    Rows with one prompt are held out together, whichever data set they are in.
    """
    from ...data.dataset import held_out_of
    from ...data.mixing import Joined, mixture

    folder = _folder(config.out) if sources.streaming else None
    read = partial(_read, how=how, tokenizer=tokenizer, folder=folder, answer_after=answer_after)
    first = read(config.data, config.split, max_length)
    others = {source: read(source, None, first.max_length) for source in sources.mix}
    notes = dict(first.notes)
    for source, other in others.items():
        notes |= {f"{note} (in {source})": count for note, count in other.notes.items()}
        if other.dropped:
            notes[f"of {source} are longer than {first.max_length} tokens and are dropped"] = other.dropped
    items: Any = Joined([first.items, *(other.items for other in others.values())]) if others else first.items
    if isinstance(config.validation, str):
        validation = read(config.validation, None, first.max_length)
        train, held_out = items, validation.items
        limit, cut, dropped = first.max_length, validation.cut, validation.dropped
        notes |= held_out_notes(config.validation, validation.notes, limit, cut, dropped)
    else:
        train, held_out = held_out_of(items, config.validation)
    shape, mixed = first.shape, None
    if others:
        _check_left(config.data, sources.mix, train.parts)
        mixed = mixture([len(part) for part in train.parts], list(sources.mix.values()))
        parts = zip(sources.mix.items(), mixed.drawn[1:], mixed.sizes[1:], strict=True)
        shape += "; mixed with " + ", ".join(
            f"{source} ({share:.0%}: {drawn:,} rows an epoch, of {size:,})" for (source, share), drawn, size in parts
        )
    counts = {"dropped": first.dropped, "cut": first.cut, "split": first.split}
    length = described(first.lengths, first.max_length, first.max_length_reason, counts, config)
    return Data(train, held_out, f"shape {shape}", [("length", length)], {}, notes, mixture=mixed), first


def _read(
    source: str,
    split: str | None,
    max_length: int | Literal["auto"],
    *,
    how: Mapping[str, Any],
    tokenizer: Any,
    folder: Path | None,
    answer_after: str | None,
) -> Any:
    from ...data.dataset import build
    from ...data.read import read_rows, stream_rows
    from ...data.split_text import answered, without_text
    from ...data.stored import build_stored

    columns = how.get("columns") or {}
    how = {**how, "columns": without_text(columns) if answer_after else columns}
    if folder is None:
        rows = answered(read_rows(source, split, columns=columns), answer_after, columns)
        return build([*rows], tokenizer, max_length=max_length, **how)
    rows = answered(stream_rows(source, split, columns), answer_after, columns)
    return build_stored(rows, tokenizer, folder, max_length=max_length, **how)


def _folder(out: str) -> Path:
    """Return a folder that exists, on the disk of the run's folder."""
    path = Path(out).expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _check_left(first: str, mix: Iterable[str], parts: Sequence[Sequence[Any]]) -> None:
    """Raise DataError if every row of a data set is held out."""
    for source, part in zip((first, *mix), parts, strict=True):
        if not len(part):
            raise DataError(f"{source}: all its rows are held out for validation\n  lower validation, or add rows")
