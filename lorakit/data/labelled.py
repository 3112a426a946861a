"""Rows with a label each, to token ids: columns `text` and `label`, or `text`, `text_pair` and `label`.

A label is a word or a whole number. Labels are numbered in the order of `names`, or else in alphabetical order (numbers
by size).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import ConfigError, DataError, did_you_mean, listing
from .dataset import LEFT_OUT, length_limit, unused_columns
from .label_names import number_of, ordered
from .parse import Row
from .shapes import WEIGHT, weighs

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("text", "text_pair", "label")


@dataclass(frozen=True)
class LabelledItem:
    """`segments`: which of two texts each id is of, for tokenizers that tell (BERT's token_type_ids)."""

    ids: list[int]
    segments: list[int] | None
    label: int
    row: Row

    @property
    def size(self) -> int:
        """Its tokens."""
        return len(self.ids)

    @property
    def weight(self) -> int:
        """Every row counts the same."""
        return 1

    @property
    def where(self) -> str:
        return self.row.where

    @property
    def group(self) -> None:
        """Any rows can share a batch."""

    @property
    def split_key(self) -> tuple[int, ...]:
        """Its text: equal ones are held out together."""
        return tuple(self.ids)

    def digest(self) -> bytes:
        """Label and ids."""
        numbers = [self.label, len(self.ids), *self.ids, *(self.segments or ())]
        return np.asarray(numbers, dtype="<i8").tobytes()


@dataclass(frozen=True)
class Labelled:
    """The items, and what happened on the way. `lengths`: tokens of each row, before the limit."""

    items: list[LabelledItem]
    names: list[str]
    shape: str
    max_length: int
    max_length_reason: str
    cut: int
    dropped: int
    notes: dict[str, int]
    lengths: list[int]


def read_labelled(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Mapping[str, str] | None = None,
    names: Sequence[str] = (),
    max_length: int | Literal["auto"] = "auto",
    on_long: Literal["auto", "drop", "cut", "split"] = "auto",
) -> Labelled:
    """Read and tokenize all rows. Longer ones are cut (the default), or dropped. DataError names a row that has no text
    or no label.
    """
    if on_long == "split":
        raise ConfigError("on_long: split would leave pieces of a text with the label of all of it\n  use cut or drop")
    notes = _unused(rows, dict(columns or {}))
    all_rows, rows = rows, [row for row in rows if WEIGHT in (columns or {}).values() or weighs(dict(row.values), row)]
    if not rows:
        raise DataError(f"{all_rows[0].file}: every row has {WEIGHT} 0, so there is nothing to train on")
    if len(rows) < len(all_rows):
        notes[LEFT_OUT] = len(all_rows) - len(rows)
    values = [_values(row, dict(columns or {})) for row in rows]
    found = [_label(row, value) for row, value in zip(rows, values, strict=True)]
    names = list(names) or ordered(found)
    if len(names) < 2:
        raise DataError(
            f"{rows[0].file}: every row has the label '{names[0]}'; classification needs two labels at least"
        )
    pair = values[0].get("text_pair") is not None
    encoded = [_encode(row, value, pair, tokenizer) for row, value in zip(rows, values, strict=True)]
    lengths = [len(ids) for ids, _ in encoded]
    limit, reason = length_limit(lengths, tokenizer, max_length, "cut")
    items, cut, dropped = [], 0, 0
    for row, value, label, (ids, segments) in zip(rows, values, found, encoded, strict=True):
        number = number_of(label, names, row.where)
        if len(ids) > limit and on_long == "drop":
            dropped += 1
            continue
        if len(ids) > limit:
            cut += 1
            ids, segments = _encode(row, value, pair, tokenizer, limit)
        items.append(LabelledItem(ids, segments, number, row))
    if not items:
        raise DataError(
            f"{rows[0].file}: every row is longer than max_length {limit} ({reason})\n"
            "  raise max_length, or use on_long: cut"
        )
    shape = "text, text_pair, label" if pair else "text, label"
    return Labelled(items, names, shape, limit, reason, cut, dropped, notes, lengths)


def collate_labelled(items: Sequence[LabelledItem], pad_id: int, multiple_of: int = 8) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` [batch, length], padded on the right, `labels` [batch]; `token_type_ids` where rows
    have them.
    """
    import torch

    length = -(-max(item.size for item in items) // multiple_of) * multiple_of
    batch = {
        "input_ids": torch.full((len(items), length), pad_id),
        "attention_mask": torch.zeros(len(items), length, dtype=torch.long),
        "labels": torch.tensor([item.label for item in items]),
    }
    if items[0].segments is not None:
        batch["token_type_ids"] = torch.zeros(len(items), length, dtype=torch.long)
    for place, item in enumerate(items):
        batch["input_ids"][place, : item.size] = torch.tensor(item.ids)
        batch["attention_mask"][place, : item.size] = 1
        if item.segments is not None:
            batch["token_type_ids"][place, : item.size] = torch.tensor(item.segments)
    return batch


def _unused(rows: Sequence[Row], columns: Mapping[str, str]) -> dict[str, int]:
    """The note on columns that nothing reads, and how many rows have one."""
    read = {*(name for name in COLUMNS if name not in columns), *columns.values(), WEIGHT}
    found = [[name for name, value in row.values.items() if value is not None and name not in read] for row in rows]
    return unused_columns(found)


def _values(row: Row, columns: dict[str, str]) -> dict[str, Any]:
    """The row's values under our names. `columns`: {ours: the file's}."""
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            raise DataError(
                f"columns: '{ours}' is not a column of labelled rows{did_you_mean(ours, COLUMNS)}\n"
                f"  known: {', '.join(COLUMNS)}"
            )
        if theirs not in row.values:
            raise DataError(
                f"{row.where}: no column '{theirs}' (columns: {ours}: {theirs}){did_you_mean(theirs, row.values)}"
            )
    values = {name: row.values.get(columns.get(name, name)) for name in COLUMNS}
    missing = next((name for name in ("text", "label") if values[name] is None), None)
    if missing is not None:
        raise DataError(
            f"{row.where}: no {missing}; columns found: {listing(row.values, 20) or 'none'}\n"
            "  expected text and label, or text, text_pair and label; or say which column is which: columns: {text: "
            "..., label: ...}"
        )
    return values


def _label(row: Row, values: Mapping[str, Any]) -> str:
    label = values["label"]
    if not isinstance(label, str | int) or not str(label).strip():
        raise DataError(f"{row.where}: its label is {label!r}; expected a word or a whole number")
    return str(label).strip()


def _encode(
    row: Row, values: Mapping[str, Any], pair: bool, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> tuple[list[int], list[int] | None]:
    """Ids, and segments where the tokenizer has them."""
    text, second = values["text"], values.get("text_pair")
    for name, value in (("text", text), *((("text_pair", second),) if pair else ())):
        if not isinstance(value, str) or not value.strip():
            raise DataError(
                f"{row.where}: its {name} is {'empty' if isinstance(value, str) else repr(value)}; expected words to "
                "classify"
            )
    if not pair and second is not None:
        raise DataError(f"{row.where}: it has a text_pair, and the rows before have none")
    if pair and tokenizer.sep_token is None:  # nothing would stand between the two
        text, second = f"{text}\n{second}", None
    made = tokenizer(text, second, truncation=limit is not None, max_length=limit, verbose=False)
    ids = list(made["input_ids"])
    if not ids:
        raise DataError(f"{row.where}: the tokenizer makes no tokens of its text")
    return ids, list(made["token_type_ids"]) if "token_type_ids" in made else None
