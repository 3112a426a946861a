"""Tokenized rows in a file instead of in memory, for data sets larger than memory.

Rows are read, rendered and written one after the other, and mapped into memory afterwards: a row is read from disk when
its step comes. They are the items that `dataset.build` makes, in the same order, so a run is the same to the last bit.
In memory stay six numbers for each row. The file has no name: it goes with the process, and a run that resumes writes
it again.
"""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from lorakit.data.dataset import Dataset, Item, OnLong, length_limit, policy_for
from lorakit.data.parse import Row
from lorakit.data.render import Renderer, TrainOn, Turns
from lorakit.data.shapes import read_examples
from lorakit.data.templates import ChatOptions, Template, style_for
from lorakit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1024  # rows rendered at once
_TOKEN = np.dtype([("id", "<i4"), ("trained", "?")])


@dataclass(frozen=True, eq=False)
class StoredItems(Sequence[Item]):
    """Items in a file. `tokens`: (id, trained) of all rows, [n]; `table`: of each item its start, size, prompt length,
    file, row number and split key, [items, 6]; `files`: names of the data's files.
    """

    tokens: np.ndarray
    table: np.ndarray
    files: Sequence[str]

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> StoredItems: ...
    def __getitem__(self, index: int | slice) -> Item | StoredItems:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        start, size, prompt, file, number, key = (int(value) for value in self.table[index])
        tokens = self.tokens[start : start + size]
        row = Row({}, self.files[file], number)
        return Item(tokens["id"].tolist(), tokens["trained"].tolist(), row, prompt, (key,))

    def select(self, indices: Iterable[int]) -> StoredItems:
        """Return the items with these indices, in this order."""
        return replace(self, table=self.table[np.fromiter(indices, np.int64)])

    @property
    def sizes(self) -> list[int]:
        """The tokens of each item."""
        sizes: list[int] = self.table[:, 1].tolist()
        return sizes


def build_stored(
    rows: Iterator[Row],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
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
    """Render all rows into a file and apply the length limit, as `dataset.build` does.

    `folder`: where the file is made. Repeated rows are not counted. Raises what `dataset.build` raises.
    """
    renderer = Renderer(tokenizer, template, train_on, turns, options, ends)
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (the memory map below holds it)
    shape, style, at = "", None, 0
    files: dict[str, int] = {}
    notes: Counter[str] = Counter()
    table = array("q")
    while chunk := list(islice(rows, CHUNK)):
        chunk_shape, examples = read_examples(chunk, columns)
        if shape and chunk_shape != shape:
            raise DataError(
                f"{chunk[0].where}: its shape is {chunk_shape}, but the rows before it are {shape}; all rows of a "
                "dataset must have the same shape"
            )
        shape, style = chunk_shape, style or style_for(examples[0].kind, tokenizer, template)
        notes["weight 0, so they are left out"] += len(chunk) - len(examples)
        for example in examples:
            several = renderer.rows(example)
            notes.update(several[0].notes)
            notes.update(f"column '{column}' is not used" for column in example.unused)
            for rendered in several:
                row = example.row
                if not any(rendered.trained[1:]):
                    raise DataError(f"{row.where}: no trained tokens: the template wrote nothing for the answer")
                item = Item(rendered.ids, rendered.trained, row, rendered.prompt, rendered.opening)
                tokens = np.empty(item.size, _TOKEN)
                tokens["id"], tokens["trained"] = item.ids, item.trained
                file.write(tokens.tobytes())
                name = files.setdefault(row.file, len(files))
                table.extend((at, item.size, rendered.prompt, name, row.number, _digest(item.split_key)))
                at += item.size
    file.flush()
    stored = np.memmap(file, _TOKEN, "r", shape=(at,))
    every = StoredItems(stored, np.array(table, np.int64).reshape(-1, 6), list(files))
    policy = policy_for(shape, on_long)
    limit, reason = length_limit(every.sizes, tokenizer, max_length, policy)
    items, long_rows, dropped = _limited(every, limit, policy)
    if not len(items):
        raise DataError(
            f"{next(iter(files))}: every row is longer than max_length {limit} ({reason})\n"
            "  raise max_length, or cut rows instead of dropping them (on_long: cut)"
        )
    assert style is not None
    found: Any = items
    return Dataset(
        items=found,
        shape=shape,
        style=style,
        train_on=train_on,
        max_length=limit,
        max_length_reason=reason,
        on_long=policy,
        lengths=every.sizes,
        cut=long_rows - dropped if policy == "cut" else 0,
        dropped=dropped,
        split=long_rows if policy == "split" else 0,
        duplicates=0,
        same_prompt=0,
        notes={note: count for note, count in notes.items() if count},
        end_tokens=renderer.written_ends(),
    )


def _limited(every: StoredItems, limit: int, policy: str) -> tuple[StoredItems, int, int]:
    """Apply the length limit. Returns the items, the number of longer rows, and how many rows were dropped."""
    sizes = every.table[:, 1]
    long_rows = int((sizes > limit).sum())
    if not long_rows or policy == "drop":
        return every.select(np.flatnonzero(sizes <= limit)), long_rows, long_rows
    table, dropped = [], 0
    for start, size, prompt, file, number, key in every.table.tolist():
        pieces = []
        for first in range(0, size, limit) if policy == "split" else [0]:
            length = min(limit, size - first)
            if size <= limit or every.tokens["trained"][start + first + 1 : start + first + length].any():
                own_prompt = min(prompt, limit) if first == 0 else 0
                if size > limit and not own_prompt:  # a part of a text is held out by itself
                    key = _digest(every.tokens["id"][start + first : start + first + length])
                pieces.append((start + first, length, own_prompt, file, number, key))
        dropped += not pieces
        table += pieces
    return replace(every, table=np.array(table, np.int64).reshape(-1, 6)), long_rows, dropped


def _digest(key: Sequence[int] | np.ndarray) -> int:
    """Eight bytes that stand for a split key: a prompt, or the opening of a conversation."""
    hashed = hashlib.blake2b(np.asarray(key, "<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(hashed, "little", signed=True)
