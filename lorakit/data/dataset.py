"""Rows to a dataset: every row rendered, measured, and limited in length, with a count of all that was left out.

The length limit is, unless given, the 99th percentile of the data. What is longer is dropped (the default for prompts and
conversations), cut at the end, or, for plain text, split into consecutive pieces (the default there: nothing is lost).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lorakit.data.parse import Row
from lorakit.data.render import Habits, Rendered, TrainOn, render
from lorakit.data.shapes import read_examples
from lorakit.data.templates import Style, Template, style_for
from lorakit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnLong = Literal["auto", "drop", "cut", "split"]

PERCENTILE = 99
MULTIPLE = 8
# Split text loses nothing by shorter pieces, and a book is one document: without a bound its length would be the limit.
TEXT_LENGTH = 1024
SPLIT_SEED = 0
# Tokenizers without a limit of their own report 10^30.
SANE_LENGTH = 10_000_000


@dataclass(frozen=True)
class Item:
    """A row ready to train on. `prompt` counts the ids before the first answer; unknown, it is the untrained beginning."""

    ids: list[int]
    trained: list[bool]
    row: Row
    prompt: int | None = None

    @property
    def prompt_length(self) -> int:
        """How many ids stand before the first answer; 0 if there is no prompt."""
        return self.prompt if self.prompt is not None else next((i for i, trained in enumerate(self.trained) if trained), 0)

    @property
    def size(self) -> int:
        """Its tokens."""
        return len(self.ids)

    @property
    def weight(self) -> int:
        """Its trained tokens; the first one is predicted from nothing and is never trained."""
        return sum(self.trained[1:])

    @property
    def where(self) -> str:
        return self.row.where

    @property
    def group(self) -> tuple[int, ...]:
        """Its prompt, or all of it where there is none: rows of one group are held out together."""
        return tuple(self.ids[: self.prompt_length] or self.ids)

    def digest(self) -> bytes:
        """Ids and mask."""
        return len(self.ids).to_bytes(8, "little") + np.asarray(self.ids, dtype="<i8").tobytes() + bytes(self.trained)


@dataclass(frozen=True)
class Dataset:
    """The items to train on and what happened on the way. `lengths` are those of all rows before the limit."""

    items: list[Item]
    shape: str
    style: Style
    train_on: TrainOn
    max_length: int
    max_length_reason: str
    on_long: Literal["drop", "cut", "split"]
    lengths: list[int]
    cut: int
    dropped: int
    split: int
    duplicates: int
    same_prompt: int
    notes: dict[str, int]


def build(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Mapping[str, str] | None = None,
    template: Template = "auto",
    train_on: TrainOn = "completion",
    max_length: int | Literal["auto"] = "auto",
    on_long: OnLong = "auto",
) -> Dataset:
    """Render all rows and apply the length limit."""
    shape, examples = read_examples(rows, columns)
    is_text = shape == "text"
    how = ("split" if is_text else "drop") if on_long == "auto" else on_long
    if how == "split" and not is_text:
        raise ConfigError(f"on_long: split is for plain text; rows of shape {shape} would lose their prompts\n  use drop or cut")
    habits = Habits.of(tokenizer)
    rendered = [render(example, tokenizer, template, train_on, habits) for example in examples]
    for row, one in zip(rows, rendered):
        # The first id is predicted from nothing, so it cannot be trained whatever its mask says.
        if not any(one.trained[1:]):
            raise DataError(
                f"{row.where}: no trained tokens: the template or tokenizer wrote nothing for the answer ({len(one.ids)} tokens in all)"
            )
    lengths = [len(one.ids) for one in rendered]
    limit, reason = length_limit(lengths, tokenizer, max_length, how)
    items: list[Item] = []
    too_long = dropped = 0
    for row, one in zip(rows, rendered):
        pieces = _limited(one, row, limit, how)
        items += pieces
        too_long += len(one.ids) > limit
        dropped += not pieces
    if not items:
        raise DataError(
            f"{rows[0].file}: every row is longer than max_length {limit} ({reason}); the shortest has {min(lengths)} tokens\n"
            "  raise max_length, or cut rows instead of dropping them (on_long: cut)"
        )
    duplicates, same_prompt = _repeats([Item(one.ids, one.trained, row, one.prompt) for row, one in zip(rows, rendered)])
    return Dataset(
        items=items,
        shape=shape,
        style=style_for(examples[0].kind, tokenizer, template),
        train_on=train_on,
        max_length=limit,
        max_length_reason=reason,
        on_long=how,
        lengths=lengths,
        cut=too_long - dropped if how == "cut" else 0,
        dropped=dropped,
        split=too_long if how == "split" else 0,
        duplicates=duplicates,
        same_prompt=same_prompt,
        notes=dict(Counter(one.note for one in rendered if one.note)),
    )


def length_limit(lengths: Sequence[int], tokenizer: PreTrainedTokenizerBase, asked: int | Literal["auto"], how: str) -> tuple[int, str]:
    """The longest row in tokens, and why. `how`: what becomes of longer ones."""
    if asked != "auto":
        if asked < 2:
            raise ConfigError(f"max_length: {asked} leaves nothing to train: at least 2 tokens are needed")
        return asked, "as given"
    most = int(np.percentile(lengths, PERCENTILE, method="higher"))
    limit = -(-most // MULTIPLE) * MULTIPLE
    reason = f"{PERCENTILE}th percentile of {len(lengths):,} rows is {most:,} tokens, rounded up to a multiple of {MULTIPLE}"
    if how == "split" and limit > TEXT_LENGTH:
        limit, reason = TEXT_LENGTH, f"longer texts are split into pieces of {TEXT_LENGTH:,} tokens"
    own = tokenizer.model_max_length
    if limit > own and own <= SANE_LENGTH:
        limit, reason = int(own), f"the tokenizer's model_max_length, below the {PERCENTILE}th percentile of the rows ({most:,})"
    return limit, reason


def _limited(one: Rendered, row: Row, limit: int, how: str) -> list[Item]:
    """The items of one row: itself, its beginning, its pieces, or nothing."""
    if len(one.ids) <= limit:
        return [Item(one.ids, one.trained, row, one.prompt)]
    if how == "drop":
        return []
    starts = range(0, len(one.ids), limit) if how == "split" else [0]
    pieces = [Item(one.ids[s : s + limit], one.trained[s : s + limit], row, min(one.prompt, limit) if s == 0 else 0) for s in starts]
    return [piece for piece in pieces if any(piece.trained[1:])]


def _repeats(items: Sequence[Item]) -> tuple[int, int]:
    """Rows that repeat an earlier one exactly, and rows that share their prompt with another completion."""
    completions: dict[tuple[int, ...], Counter[tuple[int, ...]]] = {}
    for item in items:
        completions.setdefault(item.group, Counter())[tuple(item.ids)] += 1
    duplicates = len(items) - sum(len(found) for found in completions.values())
    return duplicates, sum(found.total() for found in completions.values() if len(found) > 1)


def split(items: Sequence[Any], share: float = 0.05, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """`items` as (train, held out), each in their order. Equal prompts stay together, so that nothing held out was trained on."""
    if not 0 < share < 1:
        raise ConfigError(f"held-out share: {share} is not between 0 and 1")
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(item.group, []).append(index)
    if len(groups) < 2:
        what = (
            "there is only one row" if len(items) == 1 else f"all {len(items)} rows have the same prompt" if items else "there are no rows"
        )
        raise DataError(f"nothing can be held out for validation: {what}\n  give rows of their own for validation, or turn it off")
    wanted = max(1, round(share * len(items)))
    order = [list(groups.values())[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    held: set[int] = set()
    for group in order[:-1]:  # one prompt at least stays for training
        if len(held) + len(group) <= wanted:
            held.update(group)
    # A group larger than the share is never taken, unless all are: then the smallest is.
    if not held:
        smallest: list[int] = min(order, key=len)
        held.update(smallest)
    return [item for i, item in enumerate(items) if i not in held], [items[i] for i in sorted(held)]


def held_out_of(items: Sequence[Any], share: float) -> tuple[list[Any], list[Any]]:
    """A run's rows as (train, held out). Runs that differ in their seeds are compared on the same held-out rows."""
    return split(items, share, SPLIT_SEED) if share else (list(items), [])


def fingerprint(items: Iterable[Any]) -> str:
    """SHA-256 of all items' digests, row by row: two datasets with one fingerprint train the same."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(item.digest())
    return digest.hexdigest()
