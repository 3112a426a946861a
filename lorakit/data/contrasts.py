"""Rows to learn vectors of texts from: a text with one that belongs to it, or two texts and how similar they are.

contrasts   anchor (or query, question, text) and positive (or passage, document); negative or negatives: texts that
            do not belong
scores      text and text_pair (or sentence1 and sentence2, anchor and positive), and a score (or label)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import ConfigError, DataError, listing
from .dataset import length_limit
from .fields import RowSet, check_longest, fields_of, weighed
from .parse import Row
from .turns import string

if TYPE_CHECKING:
    pass

FIRST = ("anchor", "query", "question", "text", "sentence1")
SECOND = ("positive", "passage", "document", "text_pair", "sentence2")
NEGATIVES = ("negative", "negatives")
SCORES = ("score", "label")
RANGES = ((0, 1), (-1, 1), (0, 5), (0, 10), (0, 100))
COLUMNS = (*FIRST, *SECOND, *NEGATIVES, *SCORES)
EXPECTED = (
    "anchor (or query, question, text) and positive (or passage, document), with negative or negatives; "
    "or text, text_pair and score"
)


@dataclass(frozen=True)
class Encoding:
    """How texts become ids. `first`, `second`: prefixes of the two sides; `with_end`: the end token is added."""

    tokenizer: Any
    first: str = ""
    second: str = ""
    with_end: bool = False

    def ids(self, text: str, is_first: bool, limit: int | None = None) -> list[int]:
        """Encode a text with its side's prefix, cut to `limit` tokens, special ones included."""
        end = self.tokenizer.eos_token_id if self.with_end else None
        room = None if limit is None else limit - (end is not None)
        prefix = self.first if is_first else self.second
        made = self.tokenizer(prefix + text, truncation=room is not None, max_length=room, verbose=False)
        ids = list(made["input_ids"])
        return [*ids, end] if end is not None and ids[-1:] != [end] else ids


@dataclass(frozen=True)
class ContrastItem:
    """A row. `texts`: token ids of the anchor, of what belongs to it, and of what does not; `score`: None if the row
    has none, else from 0 to 1. `cut`: whether one of its texts was longer.
    """

    texts: tuple[tuple[int, ...], ...]
    score: float | None
    row: Row
    cut: bool = False

    @property
    def size(self) -> int:
        """Tokens of all its texts, each as long as the longest."""
        return len(self.texts) * max(map(len, self.texts))

    @property
    def weight(self) -> int:
        """Every row counts the same."""
        return 1

    @property
    def ids(self) -> list[int]:
        """All ids, to check them against the base's vocabulary."""
        return [token for text in self.texts for token in text]

    @property
    def where(self) -> str:
        return self.row.where

    @property
    def group(self) -> None:
        """Any rows can share a batch."""

    @property
    def split_key(self) -> tuple[int, ...]:
        """Its anchor: rows with the same one are held out together."""
        return self.texts[0]

    def digest(self) -> bytes:
        """Score and ids."""
        ids = [number for text in self.texts for number in (len(text), *text)]
        return np.asarray(ids, dtype="<i8").tobytes() + np.float64(-1 if self.score is None else self.score).tobytes()


def read_contrasts(
    rows: Sequence[Row],
    encoding: Encoding,
    *,
    columns: Mapping[str, str] | None = None,
    score_range: Sequence[float] = (),
    max_length: int | Literal["auto"] = "auto",
    on_long: Literal["auto", "drop", "cut", "split"] = "auto",
) -> RowSet:
    """Read and tokenize all rows. Longer texts are cut (the default), or their rows dropped.

    score_range: the lowest and the highest score, which become 0 and 1; by default a common one (`RANGES`) that has the
    rows' scores, or else from their lowest to their highest. Raises DataError, naming file and row, for one without
    texts, and where some rows have scores and others none.
    """
    if on_long == "split":
        raise ConfigError("on_long: split would leave pieces of a text, whose meaning is another\n  use cut or drop")
    columns = dict(columns or {})
    rows, notes = weighed(rows, columns, COLUMNS)
    read = [_texts(row, columns) for row in rows]
    scored = read[0][1] is not None
    for row, (_, score) in zip(rows, read, strict=True):
        if (score is not None) != scored:
            has, others = ("a", "none") if score is not None else ("no", "one")
            raise DataError(f"{row.where}: it has {has} score, and the rows before have {others}")
    low, high = _range(rows, [score for _, score in read if score is not None], score_range) if scored else (0.0, 1.0)
    encoded = [tuple(encoding.ids(text, i == 0) for i, text in enumerate(texts)) for texts, _ in read]
    longest = [max(map(len, texts)) for texts in encoded]
    limit, reason = length_limit(longest, encoding.tokenizer, max_length, "cut")
    items, cut, dropped = [], 0, 0
    for row, (texts, score), ids, length in zip(rows, read, encoded, longest, strict=True):
        if min(map(len, ids)) == 0:
            raise DataError(f"{row.where}: the tokenizer makes no tokens of one of its texts")
        if length > limit and on_long == "drop":
            dropped += 1
            continue
        if length > limit:
            cut += 1
            ids = tuple(encoding.ids(text, i == 0, limit) for i, text in enumerate(texts))
        share = None if score is None else (score - low) / (high - low)
        items.append(ContrastItem(tuple(map(tuple, ids)), share, row))
    check_longest(rows, items, limit, reason)
    about = {"score_range": [low, high]} if scored else {}
    shape = f"text, text_pair, score ({low:g} to {high:g})" if scored else "anchor, positive"
    if any(len(item.texts) > 2 for item in items):
        shape += ", negatives"
    return RowSet(items, shape, about, limit, reason, longest, cut, dropped, notes=notes)


def read_texts(
    rows: Sequence[Row], encoding: Encoding, columns: Mapping[str, str], limit: int | None
) -> list[ContrastItem]:
    """Tokenize rows to predict, in their order: a text of either side, or both. Longer ones are cut."""
    own = {ours: theirs for ours, theirs in columns.items() if ours in (*FIRST, *SECOND)}
    items = []
    for row in rows:
        values = fields_of(row, own, COLUMNS, (), EXPECTED)
        names = [_name(side, values, row) for side in (FIRST, SECOND)]
        if names == [None, None]:
            raise DataError(
                f"{row.where}: no text; columns found: {listing(row.values, 20) or 'none'}\n"
                f"  expected one of {', '.join((*FIRST, *SECOND))}; or say which: columns: {{text: ...}}"
            )
        given = [(_text(values, name, row), side == 0) for side, name in enumerate(names) if name is not None]
        texts = [encoding.ids(text, is_first) for text, is_first in given]
        cut = limit is not None and max(map(len, texts)) > limit
        if cut:
            texts = [encoding.ids(text, is_first, limit) for text, is_first in given]
        items.append(ContrastItem(tuple(map(tuple, texts)), None, row, cut))
    return items


def _texts(row: Row, columns: Mapping[str, str]) -> tuple[list[str], float | None]:
    """Return a row's anchor, its positive and its negatives; and its score, None if it has none."""
    values = fields_of(row, columns, COLUMNS, (), EXPECTED)
    first, second = (_name(side, values, row) for side in (FIRST, SECOND))
    if first is None or second is None:
        raise DataError(
            f"{row.where}: no {'text' if first is None else 'second text'}; columns found: "
            f"{listing(row.values, 20) or 'none'}\n"
            f"  expected {EXPECTED}; or say which column is which: columns: {{anchor: ..., positive: ...}}"
        )
    listed: Any = next((values[name] for name in NEGATIVES if values[name] is not None), [])
    listed = [listed] if isinstance(listed, str) else listed
    if not isinstance(listed, list | tuple):
        raise DataError(f"{row.where}: negatives is expected to be a list of texts, not {type(listed).__name__}")
    score = next((values[name] for name in SCORES if values[name] is not None), None)
    if score is not None and listed:
        raise DataError(f"{row.where}: it has a score and negatives\n  remove one of the two")
    texts = [_text(values, first, row), _text(values, second, row)]
    texts += [string(text, f"negatives[{index}]", row) for index, text in enumerate(listed)]
    return texts, None if score is None else _number(score, row)


def _name(side: Sequence[str], values: Mapping[str, Any], row: Row) -> str | None:
    """Return the column of a side; None without one. Raises DataError for several."""
    found = [name for name in side if values[name] is not None]
    if len(found) > 1:
        raise DataError(
            f"{row.where}: {' and '.join(found)} could each be the {side[0]}\n"
            f"  rename or remove one, or map the others away: columns: {{{side[0]}: {found[0]}}}"
        )
    return found[0] if found else None


def _text(values: Mapping[str, Any], name: str, row: Row) -> str:
    text = string(values[name], name, row)
    if not text.strip():
        raise DataError(f"{row.where}: {name} is empty\n  remove the row, or give it words")
    return text


def _number(score: Any, row: Row) -> float:
    try:
        number = float(score)
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number) or isinstance(score, bool):
        raise DataError(f"{row.where}: its score is {score!r}; expected a number")
    return number


def _range(rows: Sequence[Row], scores: Sequence[float], given: Sequence[float]) -> tuple[float, float]:
    least, most = min(scores), max(scores)
    if least == most and not given:
        raise DataError(f"{rows[0].file}: every row has the score {least:g}\n  expected pairs of different similarity")
    low, high = given or next((each for each in RANGES if each[0] <= least and most <= each[1]), (least, most))
    outside = next((i for i, score in enumerate(scores) if not low <= score <= high), None)
    if outside is not None:
        raise DataError(
            f"{rows[outside].where}: its score is {scores[outside]:g}, outside of score_range {low:g} to {high:g}\n"
            "  give the range that all rows are in (score_range)"
        )
    return float(low), float(high)
