"""Rows with a label or a number each, to token ids: columns `text`, optionally `text_pair`, and `label`.

A label is a word or a whole number. Labels are numbered in the order of `names`, or else in alphabetical order (numbers
by size). For regression the label is a number, whole or not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import ConfigError, DataError, listing
from ..ops import IGNORE_INDEX
from .columns import is_fraction, is_measure
from .dataset import length_limit
from .fields import RowSet, check_longest, fields_of, weighed
from .label_names import number_of, ordered
from .parse import Row
from .tables import is_numbered

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("text", "text_pair", "label")
EXPECTED = "text and label, or text, text_pair and label"


@dataclass(frozen=True)
class LabelledItem:
    """`segments`: which of two texts each id is of, for tokenizers that tell (BERT's token_type_ids). `label`: the id
    of a class, or for regression the number; IGNORE_INDEX for a row to predict. `cut`: whether its text was longer.
    """

    ids: list[int]
    segments: list[int] | None
    label: int | float
    row: Row
    cut: bool = False

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
        kind = "<i8" if isinstance(self.label, int) else "<f8"
        numbers = [len(self.ids), *self.ids, *(self.segments or ())]
        return np.asarray([self.label], dtype=kind).tobytes() + np.asarray(numbers, dtype="<i8").tobytes()


def read_labelled(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Mapping[str, str] | None = None,
    names: Sequence[str] = (),
    max_length: int | Literal["auto"] = "auto",
    on_long: Literal["auto", "drop", "cut", "split"] = "auto",
) -> RowSet:
    """Read and tokenize all rows. Longer ones are cut (the default), or dropped. DataError names a row that has no text
    or no label.
    """
    columns = dict(columns or {})
    rows, notes = weighed(rows, columns, COLUMNS)
    values = [fields_of(row, columns, COLUMNS, ("text", "label"), EXPECTED) for row in rows]
    found = [_label(row, each["label"], names) for row, each in zip(rows, values, strict=True)]
    if not names:
        _check_no_header(rows, found, columns)
    names = list(names) or ordered(found)
    if len(names) < 2:
        raise DataError(
            f"{rows[0].file}: every row has the label '{names[0]}'; classification needs two labels at least"
        )
    labels = [number_of(label, names, row.where) for row, label in zip(rows, found, strict=True)]
    return _encoded(rows, values, labels, tokenizer, max_length, on_long, {"labels": names}, notes)


def read_measured(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Mapping[str, str] | None = None,
    max_length: int | Literal["auto"] = "auto",
    on_long: Literal["auto", "drop", "cut", "split"] = "auto",
) -> RowSet:
    """Read and tokenize rows whose label is a number, for regression; otherwise as `read_labelled`."""
    columns = dict(columns or {})
    rows, notes = weighed(rows, columns, COLUMNS)
    values = [fields_of(row, columns, COLUMNS, ("text", "label"), EXPECTED) for row in rows]
    numbers = [_measured(row, each["label"], columns) for row, each in zip(rows, values, strict=True)]
    about = {"mean": float(np.mean(numbers)), "deviation": float(np.std(numbers))}
    return _encoded(rows, values, numbers, tokenizer, max_length, on_long, {"targets": about}, notes)


def read_unlabelled(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> list[LabelledItem]:
    """Tokenize rows to predict, in their order: a label is not read. Texts of more than `limit` tokens are cut."""
    own = {ours: theirs for ours, theirs in (columns or {}).items() if ours != "label" or theirs in rows[0].values}
    values = [fields_of(row, own, COLUMNS, ("text",), "text, or text and text_pair") for row in rows]
    pair = values[0].get("text_pair") is not None
    encoded = (encode(row, each["text"], each["text_pair"], pair, tokenizer) for row, each in zip(rows, values))
    items = [LabelledItem(ids, segments, IGNORE_INDEX, row) for row, (ids, segments) in zip(rows, encoded)]
    if limit is None:
        return items
    return [
        item
        if item.size <= limit
        else LabelledItem(
            *encode(item.row, each["text"], each["text_pair"], pair, tokenizer, limit), IGNORE_INDEX, item.row, True
        )
        for item, each in zip(items, values, strict=True)
    ]


def _encoded(
    rows: Sequence[Row],
    values: Sequence[Mapping[str, Any]],
    labels: Sequence[int | float],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | Literal["auto"],
    on_long: str,
    about: dict[str, Any],
    notes: dict[str, int],
) -> RowSet:
    if on_long == "split":
        raise ConfigError("on_long: split would leave pieces of a text with the label of all of it\n  use cut or drop")
    pair = values[0].get("text_pair") is not None
    texts = [(each["text"], each["text_pair"]) for each in values]
    encoded = [encode(row, *text, pair, tokenizer) for row, text in zip(rows, texts, strict=True)]
    lengths = [len(ids) for ids, _ in encoded]
    limit, reason = length_limit(lengths, tokenizer, max_length, "cut")
    items, cut, dropped = [], 0, 0
    for row, text, label, (ids, segments) in zip(rows, texts, labels, encoded, strict=True):
        if len(ids) > limit and on_long == "drop":
            dropped += 1
            continue
        if len(ids) > limit:
            cut += 1
            ids, segments = encode(row, *text, pair, tokenizer, limit)
        items.append(LabelledItem(ids, segments, label, row))
    check_longest(rows, items, limit, reason)
    shape = "text, text_pair, label" if pair else "text, label"
    return RowSet(items, shape, about, limit, reason, lengths, cut, dropped, notes=notes)


def collate_labelled(items: Sequence[LabelledItem], pad_id: int, multiple_of: int = 8) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` [batch, length], padded on the right, `labels` [batch]; `token_type_ids` where rows
    have them.
    """
    import torch

    batch = padded([item.ids for item in items], [item.segments for item in items], pad_id, multiple_of)
    return batch | {"labels": torch.tensor([item.label for item in items])}


def padded(
    ids: Sequence[Sequence[int]], segments: Sequence[Sequence[int] | None], pad_id: int, multiple_of: int = 8
) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` [rows, length], padded on the right; `token_type_ids` where rows have segments."""
    import torch

    length = -(-max(len(row) for row in ids) // multiple_of) * multiple_of
    batch = {
        "input_ids": torch.full((len(ids), length), pad_id),
        "attention_mask": torch.zeros(len(ids), length, dtype=torch.long),
    }
    if segments[0] is not None:
        batch["token_type_ids"] = torch.zeros(len(ids), length, dtype=torch.long)
    for place, (row, of_row) in enumerate(zip(ids, segments, strict=True)):
        batch["input_ids"][place, : len(row)] = torch.tensor(row)
        batch["attention_mask"][place, : len(row)] = 1
        if of_row is not None:
            batch["token_type_ids"][place, : len(row)] = torch.tensor(of_row)
    return batch


def _label(row: Row, label: Any, names: Sequence[str]) -> str:
    """Return a label's name; 1 for 1.0, as tables write whole numbers in a column that has gaps."""
    text = str(label).strip()
    if not isinstance(label, str | int | float) or not text:
        raise DataError(f"{row.where}: its label is {label!r}; expected a word or a whole number")
    if text in names or not is_measure(label):
        return text
    if is_fraction(label):
        raise DataError(
            f"{row.where}: its label is {label!r}; expected a word or a whole number\n"
            "  to predict such numbers use --task regression; if they are names, list them all: labels"
        )
    return str(int(float(label)))


def _measured(row: Row, label: Any, columns: Mapping[str, str]) -> float:
    try:
        number = math.nan if isinstance(label, bool) else float(label)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        header = "; if this line is a header, name the columns as it does" if is_numbered(columns) else ""
        raise DataError(f"{row.where}: its label is {label!r}; expected a number such as 3.8{header}")
    return number


def _check_no_header(rows: Sequence[Row], found: Sequence[str], columns: Mapping[str, str]) -> None:
    """Raise DataError if columns are given by number and the first line looks like a header."""
    counts = Counter(found)
    if is_numbered(columns) and len(rows) > 2 and counts[found[0]] == 1 and len(counts) < len(found):
        cells = listing(map(repr, rows[0].values.values()), 20)
        raise DataError(
            f"{rows[0].where}: its label '{found[0]}' occurs in no other row, and columns that are given by number are "
            "for files without a header\n"
            f"  if this line is a header, name the columns as it does: {cells}"
        )


def encode(
    row: Row, text: Any, second: Any, pair: bool, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> tuple[list[int], list[int] | None]:
    """Return ids, and segments where the tokenizer has them. `pair`: whether rows have a second text."""
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
