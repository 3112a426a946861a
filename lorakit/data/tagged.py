"""Rows of words with a tag each, to token ids: columns `tokens` (or `words`) and `tags` (or `ner_tags`, `labels`).

    words    Ada  lives  in  Abuja          text    "Ada lives in Abuja"
    tags     B-PER  O    O   B-LOC          tokens  A da Ġlives Ġin ĠAbu ja
                                            labels  B-PER - O O B-LOC -

The words are joined by spaces and tokenized as one text, as text was in pretraining: with `is_split_into_words` a
byte-level BPE tokenizer would run words into each other, or refuse. The tokenizer's offsets say which word a token is
of. The first token of a word carries its tag; the others, and special tokens, IGNORE_INDEX.
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
from .label_names import by_number, is_whole
from .labelled import padded
from .parse import Row

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# our name -> others' names for the same
ALIASES = {"tokens": ("words",), "tags": ("ner_tags", "labels")}
COLUMNS = ("tokens", "tags")
EXPECTED = "tokens (or words) and tags (or ner_tags, labels), two lists of the same length"
OUTSIDE = "O"


@dataclass(frozen=True)
class TaggedItem:
    """`labels`: the tag's id at the first token of each word, else IGNORE_INDEX; `places`: of each word, its first
    token's index, None for a word without one (cut off, or nothing that the tokenizer keeps).
    """

    ids: list[int]
    labels: list[int]
    places: list[int | None]
    row: Row

    @property
    def size(self) -> int:
        """Its tokens."""
        return len(self.ids)

    @property
    def weight(self) -> int:
        """Its words that have a tag and a token."""
        return sum(label != IGNORE_INDEX for label in self.labels)

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
        """Ids and labels."""
        return np.asarray([len(self.ids), *self.ids, *self.labels], dtype="<i8").tobytes()


def read_tagged(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Mapping[str, str] | None = None,
    names: Sequence[str] = (),
    max_length: int | Literal["auto"] = "auto",
    on_long: Literal["auto", "drop", "cut", "split"] = "auto",
) -> RowSet:
    """Read and tokenize all rows. Longer ones are cut (the default), or dropped.

    names: the tags' names, in the order of their ids; default: those of the data, O first. DataError names a row whose
    words and tags do not fit each other.
    """
    if on_long == "split":
        raise ConfigError("on_long: split would take words out of their sentence\n  use cut or drop")
    known = known_columns(rows, columns or {})
    rows, notes = weighed(rows, known, COLUMNS)
    read = [_words_and_tags(row, known) for row in rows]
    names = list(names) or _ordered({tag for _, tags in read for tag in tags if tag != str(IGNORE_INDEX)})
    if len(names) < 2:
        raise DataError(f"{rows[0].file}: every word has the tag '{names[0]}'; expected two tags at least")
    numbers = {name: label for label, name in enumerate(names)}
    encoded = [encode_words(row, words, tokenizer) for row, (words, _) in zip(rows, read, strict=True)]
    lengths = [len(ids) for ids, _ in encoded]
    limit, reason = length_limit(lengths, tokenizer, max_length, "cut")
    items: list[TaggedItem] = []
    cut = dropped = lost = without = untagged = 0
    for row, (words, tags), (ids, places) in zip(rows, read, encoded, strict=True):
        labels = [_number(row, tag, names, numbers) for tag in tags]
        without += sum(place is None for place in places)
        if len(ids) > limit and on_long == "drop":
            dropped += 1
            continue
        if len(ids) > limit:
            cut += 1
            ids, shorter = encode_words(row, words, tokenizer, limit)
            lost += sum(a is not None and b is None for a, b in zip(places, shorter, strict=True))
            places = shorter
        item = _item(row, ids, places, labels)
        if item.weight:
            items.append(item)
        else:
            untagged += 1
    check_longest(rows, items, limit, reason)
    if lost:
        notes[f"are cut at {limit} tokens, and {lost:,} words at their ends are left out"] = cut
    if without:
        notes[f"{without:,} words of which the tokenizer makes no token of their own are left out"] = len(rows)
    if untagged:
        notes["have no word that has a tag and a token, so they are left out"] = untagged
    shape = f"{known.get('tokens', 'tokens')}, {known.get('tags', 'tags')}"
    return RowSet(items, shape, {"labels": names}, limit, reason, lengths, cut, dropped, notes=notes)


def read_untagged(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> list[TaggedItem]:
    """Tokenize rows to predict, in their order: tags are not read. DataError for a row of more than `limit` tokens."""
    known = known_columns(rows, columns or {})
    known = {ours: own for ours, own in known.items() if ours != "tags" or own in rows[0].values}
    items = []
    for row in rows:
        words = _words(row, fields_of(row, known, COLUMNS, ("tokens",), "tokens (or words), a list")["tokens"])
        ids, places = encode_words(row, words, tokenizer)
        if limit is not None and len(ids) > limit:
            raise DataError(
                f"{row.where}: {len(words)} words are {len(ids)} tokens, but {limit} are the most\n"
                "  split the row into sentences"
            )
        items.append(_item(row, ids, places, [IGNORE_INDEX] * len(words)))
    return items


def words_of(item: TaggedItem, columns: Mapping[str, str]) -> list[str]:
    """Return the words of an item's row. `columns`: as for `read_untagged`."""
    known = known_columns([item.row], columns)
    return [str(word) for word in item.row.values[known.get("tokens", "tokens")]]


def collate_tagged(items: Sequence[TaggedItem], pad_id: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask`, `labels` [batch, length], padded on the right."""
    import torch

    batch = padded([item.ids for item in items], [None] * len(items), pad_id)
    labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
    for place, item in enumerate(items):
        labels[place, : item.size] = torch.tensor(item.labels)
    return batch | {"labels": labels}


def known_columns(rows: Sequence[Row], columns: Mapping[str, str]) -> dict[str, str]:
    """Return the columns as given, and for those that are not the name that the first row has for them."""
    found = dict(columns)
    for ours, others in ALIASES.items():
        alias = next((name for name in others if name in rows[0].values), None)
        if ours not in found and ours not in rows[0].values and alias is not None:
            found[ours] = alias
    return found


def encode_words(
    row: Row, words: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> tuple[list[int], list[int | None]]:
    """Return ids, and the index of each word's first token, None for a word without one. At most `limit` tokens.

    Raises ConfigError for a tokenizer without offsets.
    """
    text = " ".join(words)
    try:
        made = tokenizer(
            text, truncation=limit is not None, max_length=limit, return_offsets_mapping=True, verbose=False
        )
    except NotImplementedError as error:
        raise ConfigError(
            f"{type(tokenizer).__name__} does not say which characters a token stands for (no offsets)\n"
            "  token_classification needs a base with a fast tokenizer (tokenizer.json)"
        ) from error
    word_at = [number for number, word in enumerate(words) for _ in range(len(word) + 1)]  # and of the space after it
    places: list[int | None] = [None] * len(words)
    for place, (start, end) in enumerate(made["offset_mapping"]):
        start += len(text[start:end]) - len(text[start:end].lstrip())  # Ġlives may include the space before it
        if start < end and places[word_at[start]] is None:
            places[word_at[start]] = place
    return list(made["input_ids"]), places


def _item(row: Row, ids: list[int], places: list[int | None], labels: Sequence[int]) -> TaggedItem:
    of_tokens = [IGNORE_INDEX] * len(ids)
    for place, label in zip(places, labels, strict=True):
        if place is not None:
            of_tokens[place] = label
    return TaggedItem(ids, of_tokens, places, row)


def _words_and_tags(row: Row, columns: Mapping[str, str]) -> tuple[list[str], list[str]]:
    values = fields_of(row, columns, COLUMNS, ("tokens", "tags"), EXPECTED)
    words, tags = _words(row, values["tokens"]), values["tags"]
    if not isinstance(tags, list) or not all(isinstance(tag, str | int) and str(tag).strip() for tag in tags):
        raise DataError(f"{row.where}: its tags are {_shown(tags)}; expected a list of names or of whole numbers")
    if len(words) != len(tags):
        raise DataError(f"{row.where}: {len(words)} words, but {len(tags)} tags; expected one for each word")
    return words, [str(tag).strip() for tag in tags]


def _words(row: Row, words: Any) -> list[str]:
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise DataError(f"{row.where}: its words are {_shown(words)}; expected a list of words")
    return words


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _ordered(tags: set[str]) -> list[str]:
    if all(map(is_whole, tags)):
        return sorted(tags, key=int)
    return sorted(tags, key=lambda tag: (tag != OUTSIDE, tag))


def _number(row: Row, tag: str, names: Sequence[str], numbers: Mapping[str, int]) -> int:
    if tag in numbers:
        return numbers[tag]
    number = by_number(tag, names)
    if number is not None:
        return number
    if tag == str(IGNORE_INDEX):  # as data sets mark words that do not count
        return IGNORE_INDEX
    raise DataError(
        f"{row.where}: the tag '{tag}' is none of {len(names)}{did_you_mean(tag, names)}\n"
        f"  labels: {listing(names, 20)}"
    )
