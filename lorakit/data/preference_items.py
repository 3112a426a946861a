"""Preferences as token ids: each answer with its prompt, and the mask of the answer.

A pair is two rows of tokens, chosen and rejected, that share a forward pass and have one loss. An answer longer than
the limit leaves its pair out, or is cut at the end, as `on_long` says; either is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError, DataError
from .dataset import LEFT_OUT, Item, OnLong, length_limit, unused_columns
from .parse import Row
from .preferences import Preference, read_preferences
from .render import LAST_TURN_ONLY, Renderer
from .templates import ChatOptions, Style, Template, style_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EARLIER = "earlier answers of the conversation are context: the label is of the last one"
EQUAL = "chosen and rejected are equal, so they are left out"


@dataclass(frozen=True)
class PreferenceItem:
    """`answers`: (chosen, rejected), or a single one that is `desirable` or not.

    `mismatched`: with a single answer, its prompt with the answer to another one (see `with_mismatches`).
    """

    answers: tuple[Item, ...]
    desirable: bool | None = None
    mismatched: Item | None = None

    @property
    def ids(self) -> list[int]:
        """The first answer's, with its prompt."""
        return self.answers[0].ids

    @property
    def trained(self) -> list[bool]:
        return self.answers[0].trained

    @property
    def prompt_length(self) -> int:
        return self.answers[0].prompt_length

    @property
    def row(self) -> Row:
        return self.answers[0].row

    @property
    def size(self) -> int:
        """The tokens of its longest answer, with the prompt: each of its answers is padded to them."""
        return max(answer.size for answer in self.answers)

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
    def question(self) -> tuple[int, ...]:
        return self.answers[0].question

    @property
    def split_key(self) -> tuple[int, ...]:
        """Its prompt: rows with the same one are held out together."""
        return self.question

    def digest(self) -> bytes:
        """Which answer is better, and the ids and masks of all of them."""
        label = b"pair" if self.desirable is None else bytes([self.desirable])
        others = (self.mismatched,) if self.mismatched else ()
        return label + b"".join(answer.digest() for answer in (*self.answers, *others))


@dataclass(frozen=True)
class Preferences:
    """The items, and what happened on the way. `lengths`: of each row, its longest answer, before the limit."""

    items: list[PreferenceItem]
    shape: str
    style: Style
    max_length: int
    max_length_reason: str
    lengths: list[int]
    cut: int
    dropped: int
    notes: dict[str, int]
    end_tokens: list[int]


def build_preferences(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    apart: bool | None = None,
    columns: Mapping[str, str] | None = None,
    template: Template = "auto",
    max_length: int | Literal["auto"] = "auto",
    on_long: OnLong = "auto",
    options: ChatOptions | None = None,
    ends: Sequence[int] = (),
) -> Preferences:
    """Render all rows and apply the length limit (`max_length`, in tokens, of a prompt with one answer).

    apart: whether the loss takes answers one by one: of a pair, the chosen one is desirable then and the rejected one
    is not. None: as the rows are. The other arguments are those of `dataset.build`. Raises DataError, naming file and
    row, for a row that cannot be trained on, ConfigError for settings that do not fit the data.
    """
    if on_long == "split":
        raise ConfigError("on_long: split would part an answer from its prompt\n  use drop or cut")
    shape, preferences = read_preferences(rows, columns)
    if apart is False and preferences[0].desirable is not None:
        raise DataError(
            f"{rows[0].where}: its answer has a label, but this loss compares two answers: chosen and rejected\n"
            "  use loss: kto, or give pairs"
        )
    all_turns, last_turn = (
        Renderer(tokenizer, template, "completion", turns, options, ends) for turns in ("all", "last")
    )
    notes: Counter[str] = Counter()
    items: list[PreferenceItem] = []
    for preference in preferences:
        renderer = all_turns if preference.desirable is None else last_turn
        answers = tuple(_rendered(preference, number, renderer, notes) for number in range(len(preference.answers)))
        if len(answers) == 2 and answers[0].ids == answers[1].ids:
            notes[EQUAL] += 1
            continue
        items.append(PreferenceItem(answers, preference.desirable))
    if not items:
        raise DataError(f"{rows[0].file}: in every row, chosen and rejected are equal: there is nothing to learn")
    if apart:
        items = [single for item in items for single in _apart(item)]
    lengths = [item.size for item in items]
    limit, reason = length_limit(lengths, tokenizer, max_length, "drop")
    kept, cut = [], 0
    for item in items:
        limited = item if item.size <= limit else _cut(item, limit) if on_long == "cut" else None
        cut += limited is not None and limited is not item
        kept += [] if limited is None else [limited]
    if not kept:
        raise DataError(
            f"{rows[0].file}: every row is longer than max_length {limit} ({reason}); the shortest has {min(lengths)} "
            "tokens\n  raise max_length, or cut answers instead of dropping their rows (on_long: cut)"
        )
    notes.update(unused_columns([preference.unused for preference in preferences]))
    if len(preferences) < len(rows):
        notes[LEFT_OUT] = len(rows) - len(preferences)
    return Preferences(
        kept,
        shape,
        style_for(preferences[0].answers[0].kind, tokenizer, template),
        limit,
        reason,
        lengths,
        cut,
        len(items) - len(kept),
        dict(notes),
        sorted({*all_turns.written_ends(), *last_turn.written_ends()}),
    )


def _rendered(preference: Preference, number: int, renderer: Renderer, notes: Counter[str]) -> Item:
    """Render one of a row's answers."""
    row = preference.row
    name = "the answer" if preference.desirable is not None else ("chosen", "rejected")[number]
    rendered = renderer.rows(preference.answers[number])
    if len(rendered) > 1:
        raise DataError(
            f"{row.where}: {name} has several assistant turns, and the chat template rewrites the earlier ones, so it "
            "cannot be one row of tokens\n  put all but the last of them into the prompt"
        )
    if not any(rendered[0].trained[1:]):
        raise DataError(f"{row.where}: no trained tokens: the template or tokenizer wrote nothing for {name}")
    if number == 0:
        notes.update(EARLIER if note == LAST_TURN_ONLY else note for note in rendered[0].notes)
    return Item(rendered[0].ids, rendered[0].trained, row, rendered[0].prompt)


def _apart(item: PreferenceItem) -> list[PreferenceItem]:
    """Return the two answers of a pair as items of their own; an item with a single one as it is."""
    if item.desirable is not None:
        return [item]
    chosen, rejected = item.answers
    return [PreferenceItem((chosen,), True), PreferenceItem((rejected,), False)]


def _cut(item: PreferenceItem, limit: int) -> PreferenceItem | None:
    """Return the item with its answers cut to `limit` tokens; None if nothing is left of one."""
    answers = tuple(replace(each, ids=each.ids[:limit], trained=each.trained[:limit]) for each in item.answers)
    left = all(any(answer.trained[1:]) for answer in answers)
    if not left or (len(answers) == 2 and answers[0].ids == answers[1].ids):
        return None
    return replace(item, answers=answers)


def with_mismatches(
    items: Sequence[PreferenceItem], limit: int, others: Sequence[PreferenceItem] = ()
) -> list[PreferenceItem]:
    """Give each item its prompt with the answer of the nearest item before it that has another prompt; the last item is
    before the first. Where there is none, with the answer of one of `others`.

    KTO compares with how far the model has moved on answers that do not belong to the prompt. What exceeds `limit`
    tokens of them is left away. Raises DataError if all items have the same prompt.
    """
    made = []
    for index, item in enumerate(items):
        before = chain((items[index - back] for back in range(1, len(items))), others)
        other = next((other for other in before if other.question != item.question), None)
        if other is None:
            raise DataError(
                f"{item.where}: all rows have the same prompt, but loss: kto pairs each prompt with another one's "
                "answer\n  give rows with at least two prompts, or pairs with loss: dpo"
            )
        own, answer = item.answers[0], other.answers[0]
        start, begin = own.prompt_length, answer.prompt_length
        ids = [*own.ids[:start], *answer.ids[begin:]][:limit]
        trained = [*own.trained[:start], *answer.trained[begin:]][:limit]
        made.append(replace(item, mismatched=Item(ids, trained, own.row, start)))
    return made


def token_rows(items: Sequence[Any]) -> list[Item]:
    """Return the answers of all items, one after the other."""
    return [answer for item in items for answer in item.answers]
