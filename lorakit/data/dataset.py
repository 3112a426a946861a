"""Build a dataset from rows: render each one, apply the length limit, and count what it left out.

The length limit defaults to the 99th percentile of the rows. Longer rows are dropped (the default for prompts and
conversations), truncated, or, for plain text, split into consecutive chunks (the default there: no token is lost).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lorakit.data.parse import Row
from lorakit.data.render import EACH_ANSWER, Rendered, Renderer, TrainOn, Turns
from lorakit.data.shapes import Example, read_examples
from lorakit.data.templates import ChatOptions, Style, Template, style_for
from lorakit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnLong = Literal["auto", "drop", "cut", "split"]

PERCENTILE = 99
MULTIPLE = 8
# A book is one document: without this cap its length would be the limit. Splitting into shorter chunks loses no tokens.
TEXT_LENGTH = 1024
SPLIT_SEED = 0
LEFT_OUT = "weight 0, so they are left out"
# Tokenizers without a limit report a model_max_length of 10^30.
LARGEST_MODEL_MAX_LENGTH = 10_000_000


@dataclass(frozen=True)
class Item:
    """A row ready to train on: token ids, the loss mask `trained`, and the row they came from.

    prompt: number of ids before the first answer; None means the untrained ids at the start. opening: the first prompt
    of a conversation that became several items.
    """

    ids: list[int]
    trained: list[bool]
    row: Row
    prompt: int | None = None
    opening: tuple[int, ...] | None = None

    @property
    def prompt_length(self) -> int:
        """Number of ids before the first answer; 0 if there is no prompt."""
        return (
            self.prompt
            if self.prompt is not None
            else next((i for i, trained in enumerate(self.trained) if trained), 0)
        )

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
    def question(self) -> tuple[int, ...]:
        """Its prompt, or all of it where there is none."""
        return tuple(self.ids[: self.prompt_length] or self.ids)

    @property
    def group(self) -> None:
        """Any rows can share a batch."""

    @property
    def split_key(self) -> tuple[int, ...]:
        """Rows with the same key are held out together: those of one prompt, and those of one conversation."""
        return self.opening or self.question

    def digest(self) -> bytes:
        """Ids and mask."""
        return len(self.ids).to_bytes(8, "little") + np.asarray(self.ids, dtype="<i8").tobytes() + bytes(self.trained)


@dataclass(frozen=True)
class Dataset:
    """The items to train on, and counts of what happened to the rows.

    lengths: tokens of every row, before the limit; a conversation may be several rows. cut, dropped, split: rows over
    the limit, by what was done with them. duplicates: rows equal to an earlier one. same_prompt: rows that share a
    prompt but not the completion. notes: what the user should know, and of how many of the data's rows. end_tokens:
    those that end answers here but not yet the model's generation.
    """

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
    end_tokens: list[int] = field(default_factory=list)


def build(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Mapping[str, str] | None = None,
    template: Template = "auto",
    train_on: TrainOn = "completion",
    max_length: int | Literal["auto"] = "auto",
    on_long: OnLong = "auto",
    turns: Turns = "all",
    options: ChatOptions | None = None,
    ends: Sequence[int] = (),
) -> Dataset:
    """Render all rows and apply the length limit (`max_length`, in tokens).

    columns: our column name -> the file's. options: what the chat template gets besides the conversation. ends: the ids
    that end the model's generation, besides the tokenizer's end token. Raises DataError, naming file and row, for a row
    that cannot be trained on, and ConfigError for settings that do not fit the data.
    """
    shape, examples = read_examples(rows, columns)
    policy = policy_for(shape, on_long)
    renderer = Renderer(tokenizer, template, train_on, turns, options, ends)
    of_examples = [renderer.rows(example) for example in examples]
    rendered_rows = [(example.row, rendered) for example, several in zip(examples, of_examples) for rendered in several]
    for row, rendered in rendered_rows:
        # No context predicts the first id, so it has no loss even where the mask says trained.
        if not any(rendered.trained[1:]):
            raise DataError(
                f"{row.where}: no trained tokens: the template or tokenizer wrote nothing for the answer "
                f"({len(rendered.ids)} tokens in total)"
            )
    lengths = [len(rendered.ids) for _, rendered in rendered_rows]
    limit, reason = length_limit(lengths, tokenizer, max_length, policy)
    items: list[Item] = []
    too_long = dropped = 0
    for row, rendered in rendered_rows:
        chunks = _limited(rendered, row, limit, policy)
        items += chunks
        too_long += len(rendered.ids) > limit
        dropped += not chunks
    if not items:
        raise DataError(
            f"{rows[0].file}: every row is longer than max_length {limit} ({reason}); the shortest has {min(lengths)} "
            "tokens\n"
            "  raise max_length, or cut rows instead of dropping them (on_long: cut)"
        )
    duplicates, same_prompt = _repeats([_item(rendered, row) for row, rendered in rendered_rows])
    return Dataset(
        items=items,
        shape=shape,
        style=style_for(examples[0].kind, tokenizer, template),
        train_on=train_on,
        max_length=limit,
        max_length_reason=reason,
        on_long=policy,
        lengths=lengths,
        cut=too_long - dropped if policy == "cut" else 0,
        dropped=dropped,
        split=too_long if policy == "split" else 0,
        duplicates=duplicates,
        same_prompt=same_prompt,
        notes=_notes(rows, examples, of_examples),
        end_tokens=renderer.written_ends(),
    )


def policy_for(shape: str, on_long: OnLong) -> Literal["drop", "cut", "split"]:
    """Return what to do with rows over the length limit. Raises ConfigError for splitting rows that have prompts."""
    is_text = shape == "text"
    policy = ("split" if is_text else "drop") if on_long == "auto" else on_long
    if policy == "split" and not is_text:
        raise ConfigError(
            f"on_long: split is for plain text; rows of shape {shape} would lose their prompts\n  use drop or cut"
        )
    return policy


def _notes(rows: Sequence[Row], examples: Sequence[Example], of_examples: Sequence[list[Rendered]]) -> dict[str, int]:
    """Count what happened to the data's rows, by note."""
    notes = Counter(note for several in of_examples for note in several[0].notes)
    if EACH_ANSWER in notes:
        made = sum(len(several) for several in of_examples if len(several) > 1)
        notes[f"{EACH_ANSWER} ({made:,} rows)"] = notes.pop(EACH_ANSWER)
    notes.update(unused_columns([example.unused for example in examples]))
    if len(examples) < len(rows):
        notes[LEFT_OUT] = len(rows) - len(examples)
    return dict(notes)


def unused_columns(of_rows: Sequence[Sequence[str]]) -> dict[str, int]:
    """Return a note on the columns of each row that nothing reads, and how many rows have one."""
    counts = Counter(column for columns in of_rows for column in columns)
    if not counts:
        return {}
    names = ", ".join(f"{column} ({count:,})" if len(counts) > 1 else column for column, count in counts.items())
    return {f"columns that are not used: {names}": sum(bool(columns) for columns in of_rows)}


def length_limit(
    lengths: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_length: int | Literal["auto"], policy: str
) -> tuple[int, str]:
    """Return the length limit in tokens, and why it is that."""
    if max_length != "auto":
        if max_length < 2:
            raise ConfigError(f"max_length: {max_length} leaves nothing to train: at least 2 tokens are needed")
        return max_length, "as given"
    percentile = int(np.percentile(lengths, PERCENTILE, method="higher"))
    limit = -(-percentile // MULTIPLE) * MULTIPLE
    reason = f"{PERCENTILE}th percentile of {len(lengths):,} rows is {percentile:,} tokens"
    reason += f", rounded up to a multiple of {MULTIPLE}"
    if policy == "split" and limit > TEXT_LENGTH:
        limit, reason = TEXT_LENGTH, f"longer texts are split into chunks of {TEXT_LENGTH:,} tokens"
    model_max = tokenizer.model_max_length
    if limit > model_max and model_max <= LARGEST_MODEL_MAX_LENGTH:
        limit = int(model_max)
        reason = f"the tokenizer's model_max_length, below the {PERCENTILE}th percentile of the rows ({percentile:,})"
    return limit, reason


def _limited(rendered: Rendered, row: Row, limit: int, policy: str) -> list[Item]:
    """Return the items of one row: the row, its first `limit` tokens, its chunks, or none."""
    if len(rendered.ids) <= limit:
        return [_item(rendered, row)]
    if policy == "drop":
        return []
    chunks = []
    for start in range(0, len(rendered.ids), limit) if policy == "split" else [0]:
        inside = slice(start, start + limit)
        prompt = min(rendered.prompt, limit) if start == 0 else 0
        chunks.append(Item(rendered.ids[inside], rendered.trained[inside], row, prompt, rendered.opening))
    return [chunk for chunk in chunks if any(chunk.trained[1:])]


def _item(rendered: Rendered, row: Row) -> Item:
    return Item(rendered.ids, rendered.trained, row, rendered.prompt, rendered.opening)


def _repeats(items: Sequence[Item]) -> tuple[int, int]:
    """Count (rows equal to an earlier one, rows whose prompt occurs with another completion too)."""
    completions: dict[tuple[int, ...], Counter[tuple[int, ...]]] = {}
    for item in items:
        completions.setdefault(item.question, Counter())[tuple(item.ids)] += 1
    duplicates = len(items) - sum(len(counts) for counts in completions.values())
    return duplicates, sum(counts.total() for counts in completions.values() if len(counts) > 1)


def split(items: Sequence[Any], share: float = 0.05, seed: int = 0) -> tuple[Any, Any]:
    """Split `items` into (train, held out), both in their original order.

    Rows with the same prompt land on the same side, so no held-out prompt is trained on. Raises ConfigError for a
    `share` outside (0, 1), DataError where fewer than two prompts differ.
    """
    if not 0 < share < 1:
        raise ConfigError(f"held-out share: {share} is not between 0 and 1")
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(item.split_key, []).append(index)
    if len(groups) < 2:
        why = f"all {len(items)} rows have the same prompt" if items else "there are no rows"
        why = "there is only one row" if len(items) == 1 else why
        raise DataError(
            f"nothing can be held out for validation: {why}\n  give separate validation rows, or turn validation off"
        )
    target_size = max(1, round(share * len(items)))
    order = [list(groups.values())[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    held_out: set[int] = set()
    for group in order[:-1]:  # at least one prompt stays for training
        if len(held_out) + len(group) <= target_size:
            held_out.update(group)
    # Groups larger than the share are skipped. If every group is, take the smallest.
    if not held_out:
        smallest: list[int] = min(order, key=len)
        held_out.update(smallest)
    return select(items, (i for i in range(len(items)) if i not in held_out)), select(items, sorted(held_out))


def sizes_of(items: Sequence[Any]) -> Sequence[int]:
    """Return the items' sizes, without reading stored ones."""
    own = getattr(items, "sizes", None)
    return [item.size for item in items] if own is None else own


def groups_of(items: Sequence[Any]) -> Sequence[Any] | None:
    """Return the items' groups, which do not share a forward pass; None for stored items, which have none."""
    return None if getattr(items, "sizes", None) is not None else [item.group for item in items]


def select(items: Sequence[Any], indices: Iterable[int]) -> Any:
    """Return the items with these indices; stored items (`stored.py`) stay in their file."""
    own = getattr(items, "select", None)
    return [items[i] for i in indices] if own is None else own(indices)


def held_out_of(items: Sequence[Any], share: float) -> tuple[Any, Any]:
    """Split a run's rows into (train, held out). Runs that differ in their seeds are compared on the same held-out
    rows.
    """
    return split(items, share, SPLIT_SEED) if share else (select(items, range(len(items))), [])


def fingerprint(items: Iterable[Any]) -> str:
    """Return the SHA-256 of all items' digests, in order: datasets with equal fingerprints train identically."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(item.digest())
    return digest.hexdigest()
