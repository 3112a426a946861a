"""Rows of a question with choices, to token ids: columns `question`, `context` or both, `choices` and `answer`.

    {"question": "What does Ada see?", "choices": ["tea", "sand"], "answer": 0}        or "answer": "tea"

Each choice is a text of its own: context and question, then the choice. `answer` is the index of the right choice, from
0, its text, or its letter (A, B, ...). A letter counts only where no choice is that text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import ConfigError, DataError, did_you_mean, listing
from ..ops import IGNORE_INDEX
from .dataset import length_limit
from .fields import RowSet, check_longest, fields_of, weighed
from .labelled import encode, padded
from .parse import Row

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("question", "context", "choices", "answer")
EXPECTED = "question or context, choices (a list of texts) and answer (an index from 0, or the right choice's text)"


@dataclass(frozen=True)
class ChoiceItem:
    """`rows`, `segments`: ids and segments of each choice, with the question before it; `label`: the index of the right
    one, IGNORE_INDEX for a row to predict.
    """

    rows: list[list[int]]
    segments: list[list[int] | None]
    label: int
    choices: tuple[str, ...]
    row: Row

    @property
    def size(self) -> int:
        """Its tokens as a batch holds them: each choice is as long as the longest."""
        return len(self.rows) * self.longest

    @property
    def longest(self) -> int:
        """The tokens of its longest choice."""
        return max(len(ids) for ids in self.rows)

    @property
    def ids(self) -> list[int]:
        """The ids of all its choices."""
        return [token for ids in self.rows for token in ids]

    @property
    def weight(self) -> int:
        """Every row counts the same."""
        return 1

    @property
    def where(self) -> str:
        return self.row.where

    @property
    def group(self) -> int:
        """The number of choices: rows of one batch have as many."""
        return len(self.rows)

    @property
    def split_key(self) -> tuple[int, ...]:
        """Its texts: equal ones are held out together."""
        return tuple(self.ids)

    def digest(self) -> bytes:
        """Label and ids."""
        numbers = [self.label, len(self.rows)]
        for ids, segments in zip(self.rows, self.segments, strict=True):
            numbers += [len(ids), *ids, *(segments or ())]
        return np.asarray(numbers, dtype="<i8").tobytes()


def read_choices(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Mapping[str, str] | None = None,
    max_length: int | Literal["auto"] = "auto",
    on_long: Literal["auto", "drop", "cut", "split"] = "auto",
) -> RowSet:
    """Read and tokenize all rows. A row with a longer choice is dropped (the default): what is cut off may be the
    choice itself. DataError names a row that is no question with choices and an answer.
    """
    if on_long == "split":
        raise ConfigError("on_long: split would part a choice from its question\n  use cut or drop")
    columns = dict(columns or {})
    rows, notes = weighed(rows, columns, COLUMNS)
    read = [_values(row, columns, ("choices", "answer")) for row in rows]
    labels = [_label(row, values["answer"], values["choices"]) for row, values in zip(rows, read, strict=True)]
    encoded = [_item(row, values, label, tokenizer) for row, values, label in zip(rows, read, labels, strict=True)]
    lengths = [item.longest for item in encoded]
    limit, reason = length_limit(lengths, tokenizer, max_length, "cut")
    items, cut, dropped = [], 0, 0
    for item, values in zip(encoded, read, strict=True):
        if item.longest <= limit:
            items.append(item)
        elif on_long == "cut":
            cut += 1
            items.append(_item(item.row, values, item.label, tokenizer, limit))
        else:
            dropped += 1
    check_longest(rows, items, limit, reason)
    counts = sorted({len(item.rows) for item in items})
    shape = f"{'context, ' if read[0]['context'] is not None else ''}question, choices, answer; "
    shape += f"{counts[0]}{f' to {counts[-1]}' if len(counts) > 1 else ''} choices"
    return RowSet(items, shape, {}, limit, reason, lengths, cut, dropped, notes=notes)


def read_unchosen(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> list[ChoiceItem]:
    """Tokenize rows to predict, in their order: answers are not read. DataError for a choice of more than `limit`
    tokens.
    """
    own = {ours: theirs for ours, theirs in (columns or {}).items() if ours != "answer"}
    items = [_item(row, _values(row, own, ("choices",)), IGNORE_INDEX, tokenizer) for row in rows]
    long = next((item for item in items if limit is not None and item.longest > limit), None)
    if long is not None:
        raise DataError(
            f"{long.where}: a choice with its question is {long.longest} tokens, but {limit} are the most\n"
            "  shorten the row"
        )
    return items


def collate_choices(items: Sequence[ChoiceItem], pad_id: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` [batch, choices·length], each choice padded on the right, `labels` [batch], and
    `choices` [batch, choices], all true, which says how to part them; `token_type_ids` where rows have segments.

    All rows must have as many choices.
    """
    import torch

    count = len(items[0].rows)
    ids = [row for item in items for row in item.rows]
    segments = [row for item in items for row in item.segments]
    batch = {name: rows.unflatten(0, (-1, count)).flatten(1) for name, rows in padded(ids, segments, pad_id).items()}
    return batch | {
        "labels": torch.tensor([item.label for item in items]),
        "choices": torch.ones(len(items), count, dtype=torch.bool),
    }


def _values(row: Row, columns: Mapping[str, str], required: Sequence[str]) -> dict[str, Any]:
    values = fields_of(row, columns, COLUMNS, required, EXPECTED)
    if values["question"] is None and values["context"] is None:
        raise DataError(f"{row.where}: no question and no context; columns found: {listing(row.values, 20)}")
    choices = values["choices"]
    if isinstance(choices, Mapping) and isinstance(choices.get("text"), list):  # ARC's {"text": [...], "label": [...]}
        if isinstance(choices.get("label"), list) and values["answer"] in choices["label"]:
            values["answer"] = choices["label"].index(values["answer"])
        choices = values["choices"] = choices["text"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise DataError(f"{row.where}: its choices are {choices!r}; expected a list of two texts at least")
    if len(set(choices)) < len(choices):
        raise DataError(f"{row.where}: two of its choices are the same: {listing(map(repr, choices), 8)}")
    return values


def _label(row: Row, answer: Any, choices: Sequence[str]) -> int:
    """Return the index of the right choice."""
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    text = str(answer).strip()
    number = int(text) if text.isdecimal() else ord(text) - ord("A") if len(text) == 1 and text.isupper() else -1
    if isinstance(answer, bool) or not 0 <= number < len(choices):
        hint = did_you_mean(text, choices) if isinstance(answer, str) else ""
        raise DataError(
            f"{row.where}: its answer is {answer!r}{hint}\n"
            f"  expected an index from 0 to {len(choices) - 1}, a letter from A, or the text of one of: "
            f"{listing(choices, 8)}"
        )
    return number


def _item(
    row: Row, values: Mapping[str, Any], label: int, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> ChoiceItem:
    texts = [values[name] for name in ("context", "question") if values[name] is not None]
    before = "\n".join(text for text in texts if isinstance(text, str)) if all(map(_is_text, texts)) else None
    encoded = [encode(row, before, choice, True, tokenizer, limit) for choice in values["choices"]]
    return ChoiceItem(
        [ids for ids, _ in encoded], [segments for _, segments in encoded], label, tuple(values["choices"]), row
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
