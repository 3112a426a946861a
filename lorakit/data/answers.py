"""Rows of a question and a text that holds its answer, to windows: columns `question`, `context`, `answers`.

    {"question": "Who sees?", "context": "Ada sees tea.", "answers": {"text": ["Ada"], "answer_start": [0]}}    SQuAD
    {"question": "Who sees?", "context": "Ada sees tea.", "answer": "Ada"}

A row that does not fit into a window becomes several, each with the question and a part of the context, that overlap by
`stride` tokens (as in Devlin et al. 2019). The tokenizer's offsets say which characters of the context a token stands
for. A window without the whole answer has the label (0, 0): its first token, which is never of a context.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import ConfigError, DataError
from .dataset import length_limit
from .fields import RowSet, check_longest, fields_of, weighed
from .labelled import padded
from .parse import Row

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("question", "context", "answers", "answer", "id", "title")
EXPECTED = "question, context and answers ({text: [...], answer_start: [...]}) or answer, a text"
WINDOW = 384  # tokens, the most of a window that is not given: SQuAD's usual (Devlin et al. 2019)

Offsets = list[tuple[int, int] | None]


@dataclass(frozen=True)
class Answer:
    """`start`: its first character in the context."""

    text: str
    start: int

    @property
    def end(self) -> int:
        """The character after its last."""
        return self.start + len(self.text)


@dataclass(frozen=True)
class WindowItem:
    """A window of a row.

    offsets: of each token, the characters of the context that it stands for; None for other tokens. span: the first and
    last token of the answer, (0, 0) where the window has none. answers: all right ones; may_be_empty: whether "no
    answer" can be predicted. key: equal for rows of one context.
    """

    ids: list[int]
    segments: list[int] | None
    offsets: Offsets
    span: tuple[int, int]
    context: str
    row: Row
    answers: tuple[str, ...]
    may_be_empty: bool
    key: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its tokens."""
        return len(self.ids)

    @property
    def weight(self) -> int:
        """Every window counts the same."""
        return 1

    @property
    def where(self) -> str:
        return self.row.where

    @property
    def group(self) -> None:
        """Any windows can share a batch."""

    @property
    def split_key(self) -> tuple[int, ...]:
        """Its context: questions about one text are held out together."""
        return self.key

    def digest(self) -> bytes:
        """Ids and span."""
        return np.asarray([*self.span, len(self.ids), *self.ids, *(self.segments or ())], dtype="<i8").tobytes()


@dataclass(frozen=True)
class QuestionItem:
    """A row to predict: all its windows."""

    windows: tuple[WindowItem, ...]
    row: Row

    @property
    def size(self) -> int:
        """The tokens of its longest window."""
        return max(window.size for window in self.windows)

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

    def digest(self) -> bytes:
        """Its windows' digests."""
        return b"".join(window.digest() for window in self.windows)


@dataclass(frozen=True)
class Windows:
    """How rows become windows. window, stride: tokens; may_be_empty: as of `WindowItem`."""

    tokenizer: PreTrainedTokenizerBase
    window: int
    stride: int
    may_be_empty: bool = False

    def of(self, row: Row, question: str, context: str, answers: Sequence[Answer]) -> list[WindowItem]:
        """Return a row's windows. Raises DataError for a question that leaves no room for a context."""
        cut = self._pairs if self.tokenizer.sep_token is not None else self._joined
        key = (int.from_bytes(hashlib.sha256(context.encode()).digest()[:8]),)
        texts = tuple(answer.text for answer in answers)
        first = answers[0] if answers else None
        return [
            WindowItem(ids, segments, offsets, _span(offsets, first), context, row, texts, self.may_be_empty, key)
            for ids, segments, offsets in cut(row, question, context)
        ]

    def _pairs(self, row: Row, question: str, context: str) -> Iterator[tuple[list[int], list[int] | None, Offsets]]:
        """Yield windows with the tokenizer's own template for two texts: [CLS] question [SEP] context [SEP]."""
        self._check(row, len(self.tokenizer(question, "", verbose=False)["input_ids"]))
        made = self.tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=self.window,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        for number, ids in enumerate(made["input_ids"]):
            of_text = made.sequence_ids(number)
            offsets = [
                _trimmed(context, *span) if text == 1 else None
                for span, text in zip(made["offset_mapping"][number], of_text, strict=True)
            ]
            segments = made["token_type_ids"][number] if "token_type_ids" in made else None
            yield list(ids), segments, offsets

    def _joined(self, row: Row, question: str, context: str) -> Iterator[tuple[list[int], None, Offsets]]:
        """Yield windows of a line with the question and a part of the context, for decoders: they read the question
        first, and nothing else would stand between the two.
        """
        before = list(self.tokenizer(f"{question}\n", verbose=False)["input_ids"])
        self._check(row, len(before))
        made = self.tokenizer(context, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, spans = list(made["input_ids"]), [_trimmed(context, *span) for span in made["offset_mapping"]]
        room = self.window - len(before)
        for start in range(0, max(1, len(ids) - self.stride), room - self.stride):
            part = slice(start, start + room)
            yield [*before, *ids[part]], None, [*([None] * len(before)), *spans[part]]

    def _check(self, row: Row, before: int) -> None:
        if self.window - before <= self.stride:
            raise DataError(
                f"{row.where}: its question and special tokens are {before} tokens, which leaves a window of "
                f"{self.window} tokens no room beside an overlap of {self.stride}\n"
                "  use a larger window or a smaller stride"
            )


def read_questions(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Mapping[str, str] | None = None,
    window: int | Literal["auto"] = "auto",
    stride: int = 128,
    no_answer: bool | Literal["auto"] = "auto",
    positions: int | None = None,
) -> RowSet:
    """Read rows into windows.

    window: tokens of a window; "auto": the 99th percentile of the rows, at most 384 and at most `positions`, the
    model's. stride: tokens that windows share, at most a third of a window. no_answer: whether rows may have none;
    "auto": if some have none. Raises DataError, naming file and row, ConfigError for settings that do not fit.
    """
    check_offsets(tokenizer)
    columns = dict(columns or {})
    rows, notes = weighed(list(questions_of(rows)), columns, COLUMNS)
    read = [_read(row, columns) for row in rows]
    without = sum(not answers for *_, answers, _ in read)
    if no_answer is False and without:
        row = next(row for row, (*_, answers, _) in zip(rows, read, strict=True) if not answers)
        raise DataError(
            f"{row.where}: it has no answer, and no_answer is false\n"
            "  remove such rows, or let the model learn to say that there is none: no_answer: true"
        )
    if without:
        notes["have no answer, and the model learns to say so"] = without
    elsewhere = sum(several for *_, several in read)
    if elsewhere:
        notes["have no answer_start, and an answer that stands in the context several times: the first is taken"] = (
            elsewhere
        )
    may_be_empty = bool(without) if no_answer == "auto" else no_answer
    whole = Windows(tokenizer, 1 << 30, 0, may_be_empty)
    lengths = [whole.of(row, question, context, ())[0].size for row, (question, context, *_) in zip(rows, read)]
    limit, reason = length_limit(lengths, tokenizer, window, "split")
    if window == "auto":
        most = min(WINDOW, positions or WINDOW)
        limit, reason = (limit, reason) if limit <= most else (most, "longer rows are several windows")
    elif positions is not None and window > positions:
        raise ConfigError(
            f"window: {window} is more than the {positions} positions of the model\n  give {positions} or less"
        )
    made = Windows(tokenizer, limit, min(stride, limit // 3), may_be_empty)
    items: list[WindowItem] = []
    lost = several = 0
    for row, (question, context, answers, _) in zip(rows, read, strict=True):
        windows = made.of(row, question, context, answers)
        several += len(windows) > 1
        if answers and all(each.span == (0, 0) for each in windows):
            lost += 1
        else:
            items += windows
    if lost:
        notes["have an answer that no window holds, and are left out: use a larger window or stride"] = lost
    if several:
        notes[f"are longer than a window of {limit} tokens, and are several that share {made.stride}"] = several
    check_longest(rows, items, limit, reason)
    about = {"no_answer": may_be_empty, "window": limit, "stride": made.stride}
    shape = f"question, context, answers; {len(rows):,} questions in {len(items):,} windows"
    return RowSet(items, shape, about, limit, reason, lengths, notes=notes)


def read_unanswered(rows: Sequence[Row], columns: Mapping[str, str], made: Windows) -> list[QuestionItem]:
    """Read rows to predict, in their order; answers are not read."""
    check_offsets(made.tokenizer)
    own = {ours: theirs for ours, theirs in columns.items() if ours in ("question", "context")}
    items = []
    for row in questions_of(rows):
        question, context = _texts(row, fields_of(row, own, COLUMNS, ("question", "context"), "question and context"))
        items.append(QuestionItem(tuple(made.of(row, question, context, ())), row))
    return items


def questions_of(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield a row for each question: SQuAD's own files have articles of paragraphs with several questions each.

    Raises DataError for a paragraph without a list of questions (qas).
    """
    number = 0
    for row in rows:
        paragraphs = row.values.get("paragraphs")
        if not isinstance(paragraphs, list):
            yield row
            continue
        for paragraph in paragraphs:
            asked = paragraph.get("qas") if isinstance(paragraph, dict) else None
            if not isinstance(asked, list) or not all(isinstance(qa, dict) for qa in asked):
                raise DataError(f"{row.where}: a paragraph has no list of questions (qas), as SQuAD's files have")
            for qa in asked:
                number += 1
                yield Row(
                    {
                        "id": qa.get("id"),
                        "title": row.values.get("title"),
                        "question": qa.get("question"),
                        "context": paragraph.get("context"),
                        "answers": _in_columns([] if qa.get("is_impossible") else qa.get("answers")),
                    },
                    row.file,
                    number,
                )


def _in_columns(answers: Any) -> Any:
    """Return SQuAD's list of answers as {"text": [...], "answer_start": [...]}; anything else as it is, for `_read` to
    name.
    """
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        return answers
    return {name: [answer.get(name) for answer in answers] for name in ("text", "answer_start")}


def rows_of(items: Sequence[WindowItem]) -> list[list[int]]:
    """Return the indices of the windows of each row, in the rows' order."""
    found: dict[tuple[str, int], list[int]] = {}
    for place, item in enumerate(items):
        found.setdefault((item.row.file, item.row.number), []).append(place)
    return list(found.values())


def collate_windows(items: Sequence[WindowItem], pad_id: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` [batch, length], padded on the right, `start_positions`, `end_positions` [batch];
    `token_type_ids` where windows have segments.
    """
    import torch

    batch = padded([item.ids for item in items], [item.segments for item in items], pad_id)
    starts, ends = zip(*(item.span for item in items), strict=True)
    return batch | {"start_positions": torch.tensor(starts), "end_positions": torch.tensor(ends)}


def check_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError for a tokenizer without offsets."""
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"{type(tokenizer).__name__} does not say which characters a token stands for (no offsets)\n"
            "  the task needs a base with a fast tokenizer (tokenizer.json)"
        )


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Return a token's characters without spaces at their start, which a byte-level token includes."""
    return start + len(text[start:end]) - len(text[start:end].lstrip()), end


def _span(offsets: Offsets, answer: Answer | None) -> tuple[int, int]:
    """Return the answer's first and last token, (0, 0) if the window does not hold all of it."""
    if answer is None:
        return 0, 0
    own = [place for place, span in enumerate(offsets) if span is not None and span[0] < span[1]]
    inside = [p for p in own if offsets[p][0] < answer.end and offsets[p][1] > answer.start]  # type: ignore[index]
    if not inside or offsets[own[0]][0] > answer.start or offsets[own[-1]][1] < answer.end:  # type: ignore[index]
        return 0, 0
    return inside[0], inside[-1]


def _read(row: Row, columns: Mapping[str, str]) -> tuple[str, str, list[Answer], bool]:
    """Return question, context, answers, and whether the first answer's place was chosen among several."""
    values = fields_of(row, columns, COLUMNS, ("question", "context"), EXPECTED)
    question, context = _texts(row, values)
    if values["answers"] is None and values["answer"] is None:
        raise DataError(f"{row.where}: no answers\n  expected {EXPECTED}; answers: [] for a question without one")
    given = values["answers"] if values["answers"] is not None else values["answer"]
    if isinstance(given, Mapping):
        texts, starts = given.get("text"), given.get("answer_start")
    else:
        texts, starts = ([given] if isinstance(given, str) else given), None
    if isinstance(texts, str):
        texts, starts = [texts], ([starts] if isinstance(starts, int) else starts)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{row.where}: its answers are {given!r}\n  expected {EXPECTED}")
    texts = texts if any(texts) else []  # "" says that there is none
    if starts is None:
        starts = [context.find(text) for text in texts]
        chosen = bool(texts) and context.count(texts[0]) > 1
    else:
        chosen = False
    if not isinstance(starts, list) or len(starts) < len(texts):
        raise DataError(f"{row.where}: {len(texts)} answers, but answer_start is {starts!r}; expected one for each")
    answers = [Answer(text, start) for text, start in zip(texts, starts)]
    for answer in answers:
        if not answer.text.strip() or context[answer.start : answer.end] != answer.text or answer.start < 0:
            there = context[max(0, answer.start) : max(0, answer.start) + max(1, len(answer.text))]
            found = f"at character {answer.start} the context has {there!r}" if answer.start >= 0 else "it is nowhere"
            raise DataError(
                f"{row.where}: the answer {answer.text!r} does not stand in the context: {found}\n"
                "  expected answer_start to be the index of the answer's first character"
            )
    return question, context, answers, chosen


def _texts(row: Row, values: Mapping[str, Any]) -> tuple[str, str]:
    for name in ("question", "context"):
        if not isinstance(values[name], str) or not values[name].strip():
            raise DataError(f"{row.where}: its {name} is {values[name]!r}; expected a text")
    return values["question"].strip(), values["context"]
