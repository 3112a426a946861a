"""Build a dataset from rows: render each one, apply the length limit, and count what it left out.

The length limit defaults to the 99th percentile of the rows. Longer rows are dropped (the default for prompts and
conversations), truncated, or, for plain text, split into consecutive chunks (the default there: no token is lost).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lorakit.data.parse import Row
from lorakit.data.render import Rendered, TokenizerBehaviour, TrainOn, render
from lorakit.data.shapes import read_examples
from lorakit.data.templates import Style, Template, style_for
from lorakit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnLong = Literal["auto", "drop", "cut", "split"]

PERCENTILE = 99
MULTIPLE = 8
# A book is one document: without this cap its length would be the limit. Splitting into shorter chunks loses no tokens.
TEXT_LENGTH = 1024
SPLIT_SEED = 0
# Tokenizers without a limit report a model_max_length of 10^30.
LARGEST_MODEL_MAX_LENGTH = 10_000_000


@dataclass(frozen=True)
class Item:
    """A row ready to train on: token ids, the loss mask `trained`, and the row they came from.

    prompt: number of ids before the first answer; None means the untrained ids at the start.
    """

    ids: list[int]
    trained: list[bool]
    row: Row
    prompt: int | None = None

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
    def group(self) -> tuple[int, ...]:
        """Its prompt, or all of it where there is none: rows of one group are held out together."""
        return tuple(self.ids[: self.prompt_length] or self.ids)

    def digest(self) -> bytes:
        """Ids and mask."""
        return len(self.ids).to_bytes(8, "little") + np.asarray(self.ids, dtype="<i8").tobytes() + bytes(self.trained)


@dataclass(frozen=True)
class Dataset:
    """The items to train on, and counts of what happened to the rows.

    lengths: tokens of every row, before the limit. cut, dropped, split: rows over the limit, by what was done with
    them. duplicates: rows equal to an earlier one. same_prompt: rows that share a prompt but not the completion.
    notes: each note of `render` and the number of rows that have it.
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
    """Render all rows and apply the length limit (`max_length`, in tokens).

    columns: our column name -> the file's. Raises DataError, naming file and row, for a row that cannot be trained on,
    and ConfigError for settings that do not fit the data.
    """
    shape, examples = read_examples(rows, columns)
    is_text = shape == "text"
    policy = ("split" if is_text else "drop") if on_long == "auto" else on_long
    if policy == "split" and not is_text:
        raise ConfigError(
            f"on_long: split is for plain text; rows of shape {shape} would lose their prompts\n  use drop or cut"
        )
    behaviour = TokenizerBehaviour.of(tokenizer)
    examples_as_ids = [render(example, tokenizer, template, train_on, behaviour) for example in examples]
    for row, rendered in zip(rows, examples_as_ids):
        # No context predicts the first id, so it has no loss even where the mask says trained.
        if not any(rendered.trained[1:]):
            raise DataError(
                f"{row.where}: no trained tokens: the template or tokenizer wrote nothing for the answer "
                f"({len(rendered.ids)} tokens in total)"
            )
    lengths = [len(rendered.ids) for rendered in examples_as_ids]
    limit, reason = length_limit(lengths, tokenizer, max_length, policy)
    items: list[Item] = []
    too_long = dropped = 0
    for row, rendered in zip(rows, examples_as_ids):
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
    unlimited = [Item(r.ids, r.trained, row, r.prompt) for row, r in zip(rows, examples_as_ids)]
    duplicates, same_prompt = _repeats(unlimited)
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
        notes=dict(Counter(rendered.note for rendered in examples_as_ids if rendered.note)),
    )


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
        return [Item(rendered.ids, rendered.trained, row, rendered.prompt)]
    if policy == "drop":
        return []
    chunks = []
    for start in range(0, len(rendered.ids), limit) if policy == "split" else [0]:
        inside = slice(start, start + limit)
        prompt = min(rendered.prompt, limit) if start == 0 else 0
        chunks.append(Item(rendered.ids[inside], rendered.trained[inside], row, prompt))
    return [chunk for chunk in chunks if any(chunk.trained[1:])]


def _repeats(items: Sequence[Item]) -> tuple[int, int]:
    """Count (rows equal to an earlier one, rows whose prompt occurs with another completion too)."""
    completions: dict[tuple[int, ...], Counter[tuple[int, ...]]] = {}
    for item in items:
        completions.setdefault(item.group, Counter())[tuple(item.ids)] += 1
    duplicates = len(items) - sum(len(counts) for counts in completions.values())
    return duplicates, sum(counts.total() for counts in completions.values() if len(counts) > 1)


def split(items: Sequence[Any], share: float = 0.05, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Split `items` into (train, held out), both in their original order.

    Rows with the same prompt land on the same side, so no held-out prompt is trained on. Raises ConfigError for a
    `share` outside (0, 1), DataError where fewer than two prompts differ.
    """
    if not 0 < share < 1:
        raise ConfigError(f"held-out share: {share} is not between 0 and 1")
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(item.group, []).append(index)
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
    return [item for i, item in enumerate(items) if i not in held_out], [items[i] for i in sorted(held_out)]


def held_out_of(items: Sequence[Any], share: float) -> tuple[list[Any], list[Any]]:
    """Split a run's rows into (train, held out). Runs that differ in their seeds are compared on the same held-out
    rows.
    """
    return split(items, share, SPLIT_SEED) if share else (list(items), [])


def fingerprint(items: Iterable[Any]) -> str:
    """Return the SHA-256 of all items' digests, in order: datasets with equal fingerprints train identically."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(item.digest())
    return digest.hexdigest()
