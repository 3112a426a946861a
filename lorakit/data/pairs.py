"""Rows for an encoder-decoder: a source, which the encoder reads, and a target, which the decoder learns to write.

    source        source, prompt, question, input, text, document, article or dialogue; or instruction (and input)
    target        target, completion, answer, output, response, summary or highlights; or references (the first one)
    translation   {"translation": {"en": ..., "de": ...}}: languages are columns, columns: {source: en, target: de}

Both sides are encoded as the tokenizer does it for its model, with the tokens that it puts around a text. A target ends
with the end token, which is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import ConfigError, DataError, did_you_mean, listing
from ..ops import IGNORE_INDEX
from .dataset import LEFT_OUT, OnLong, length_limit, unused_columns
from .parse import Row
from .shapes import WEIGHT, weighs
from .turns import string

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

SOURCES = ("source", "prompt", "question", "input", "text", "document", "article", "dialogue")
TARGETS = ("target", "completion", "answer", "output", "response", "summary", "highlights")
OURS = (*SOURCES, *TARGETS, "references", "instruction")
ACCEPTED = f"""accepted columns:
    source   {", ".join(SOURCES)}; or instruction (and input)
    target   {", ".join(TARGETS)}; or references, a list of correct answers"""


@dataclass(frozen=True)
class PairItem:
    """A row to train on. `ids`: of the source; `target`: of the target, all trained; `references`: correct answers."""

    ids: list[int]
    target: list[int]
    references: tuple[str, ...]
    row: Row

    @property
    def size(self) -> int:
        """Tokens of both sides."""
        return len(self.ids) + len(self.target)

    @property
    def weight(self) -> int:
        """Tokens of the target."""
        return len(self.target)

    @property
    def where(self) -> str:
        return self.row.where

    @property
    def group(self) -> None:
        """Any rows can share a batch."""

    @property
    def split_key(self) -> tuple[int, ...]:
        """Its source: rows with the same one are held out together."""
        return tuple(self.ids)

    def digest(self) -> bytes:
        """The ids of both sides."""
        return np.asarray([len(self.ids), *self.ids, *self.target], dtype="<i8").tobytes()


@dataclass(frozen=True)
class Limit:
    """The length limit of one side. `lengths`: tokens of each row before it."""

    limit: int
    reason: str
    lengths: list[int]


@dataclass(frozen=True)
class Pairs:
    """The items, and what happened on the way. cut, dropped: rows over a limit, by what was done with them."""

    items: list[PairItem]
    source: Limit
    target: Limit
    cut: int
    dropped: int
    notes: dict[str, int]


def with_languages(tokenizer: Any, source: str | None, target: str | None) -> Any:
    """Return the tokenizer set to a pair of languages (mBART, M2M100, NLLB); itself for None.

    Raises ConfigError for a tokenizer without languages, or one that it does not know.
    """
    if source is None and target is None:
        return tokenizer
    other = copy(tokenizer)
    for setting, name, language in (("source_language", "src_lang", source), ("target_language", "tgt_lang", target)):
        if language is None:
            continue
        if not hasattr(other, name):
            raise ConfigError(f"{setting}: this model's tokenizer has no languages\n  remove {setting}")
        known = getattr(other, "lang_code_to_id", None) or other.get_vocab()
        if language not in known and language not in getattr(other, "lang_code_to_token", ()):
            raise ConfigError(f"{setting}: the tokenizer does not know '{language}'{did_you_mean(language, known)}")
        setattr(other, name, language)
    return other


def source_ids(tokenizer: Any, text: str, prefix: str = "", limit: int | None = None) -> list[int]:
    """Encode what the encoder reads. `limit`: cut the text so that at most this many tokens are left, special ones
    included.
    """
    made = tokenizer(prefix + text, truncation=limit is not None, max_length=limit, verbose=False)
    return list(made["input_ids"])


def target_ids(tokenizer: Any, text: str) -> list[int]:
    """Encode what the decoder writes, with an end token. Raises DataError if the tokenizer has none."""
    ids = list(tokenizer(text_target=text, verbose=False)["input_ids"])
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise DataError(
            "the tokenizer has no end (eos) token, so a model trained with it cannot learn to stop\n"
            "  set one: eos_token in tokenizer_config.json"
        )
    return ids if end in ids else [*ids, end]


def read_pairs(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Mapping[str, str] | None = None,
    prefix: str = "",
    max_length: int | Literal["auto"] = "auto",
    max_target_length: int | Literal["auto"] = "auto",
    on_long: OnLong = "auto",
) -> Pairs:
    """Read and tokenize all rows. `columns`: our column name -> the file's; `prefix`: written before every source.

    Rows with a side over its limit are dropped (the default) or cut; a target that is cut has no end token. Raises
    DataError, naming file and row, for one that cannot be trained on.
    """
    if on_long == "split":
        raise ConfigError("on_long: split is for plain text; a target belongs to all of its source\n  use drop or cut")
    columns = dict(columns or {})
    trained = [row for row in rows if WEIGHT in columns.values() or weighs(dict(row.values), row)]
    if not trained:
        raise DataError(f"{rows[0].file}: every row has {WEIGHT} 0, so there is nothing to train on")
    texts = [_texts(row, columns) for row in trained]
    sources = [
        _encoded(row, source_ids(tokenizer, source, prefix), "source") for row, (source, _) in zip(trained, texts)
    ]
    targets = [target_ids(tokenizer, answers[0]) for _, answers in texts]
    of_source = _limit(sources, tokenizer, max_length)
    of_target = _limit(targets, tokenizer, max_target_length)
    items, cut, dropped = [], 0, 0
    for row, (source, answers), ids, target in zip(trained, texts, sources, targets, strict=True):
        if len(ids) <= of_source.limit and len(target) <= of_target.limit:
            items.append(PairItem(ids, target, answers, row))
        elif on_long == "cut":
            cut += 1
            shorter = source_ids(tokenizer, source, prefix, of_source.limit)
            items.append(PairItem(shorter, target[: of_target.limit], answers, row))
        else:
            dropped += 1
    if not items:
        raise DataError(
            f"{rows[0].file}: every row is longer than max_length {of_source.limit} ({of_source.reason}) or "
            f"max_target_length {of_target.limit} ({of_target.reason})\n"
            "  raise them, or cut rows instead of dropping them (on_long: cut)"
        )
    notes = unused_columns([_unused(row, columns) for row in trained])
    if len(trained) < len(rows):
        notes[LEFT_OUT] = len(rows) - len(trained)
    return Pairs(items, of_source, of_target, cut, dropped, notes)


def read_sources(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, columns: Mapping[str, str], prefix: str
) -> list[list[int]]:
    """Return the ids of each row's source; targets may be missing. Raises DataError, naming a row without one."""
    own = {ours: theirs for ours, theirs in columns.items() if ours in SOURCES or ours == "instruction"}
    return [
        _encoded(row, source_ids(tokenizer, _source(row, _renamed(row, own), own), prefix), "source") for row in rows
    ]


def collate_pairs(items: Sequence[PairItem], pad_id: int, multiple_of: int = 8) -> dict[str, torch.Tensor]:
    """Return `input_ids`, `attention_mask` [batch, source length] and `labels` [batch, target length], padded on the
    right to multiples of `multiple_of`; labels with -100.
    """
    import torch

    source, target = (
        -(-longest // multiple_of) * multiple_of
        for longest in (max(len(item.ids) for item in items), max(len(item.target) for item in items))
    )
    batch = {
        "input_ids": torch.full((len(items), source), pad_id),
        "attention_mask": torch.zeros(len(items), source, dtype=torch.long),
        "labels": torch.full((len(items), target), IGNORE_INDEX),
    }
    for place, item in enumerate(items):
        batch["input_ids"][place, : len(item.ids)] = torch.tensor(item.ids)
        batch["attention_mask"][place, : len(item.ids)] = 1
        batch["labels"][place, : len(item.target)] = torch.tensor(item.target)
    return batch


# ------------------------------------------------------------------------------------- columns


def _renamed(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """Return a row's values under our names, without nulls; the languages of a translation are columns."""
    values = dict(row.values)
    if isinstance(values.get("translation"), dict):
        values |= values.pop("translation")
    for ours, theirs in columns.items():
        if ours not in OURS:
            raise DataError(
                f"columns: '{ours}' is not a column of pairs{did_you_mean(ours, OURS)}\n  known: {', '.join(OURS)}"
            )
        if theirs not in values:
            raise DataError(
                f"{row.where}: no column '{theirs}' (columns: {ours}: {theirs}){did_you_mean(theirs, values)}\n"
                f"  columns found: {listing(values, 20)}"
            )
    mapped = {*columns.values()}
    found = {name: value for name, value in values.items() if name not in mapped}
    found |= {ours: values[theirs] for ours, theirs in columns.items()}
    return {name: value for name, value in found.items() if value is not None}


def _texts(row: Row, columns: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """Return a row's source and its correct answers, of which the first is trained."""
    values = _renamed(row, columns)
    source = _source(row, values, columns)
    listed = values.get("references", [])
    listed = [listed] if isinstance(listed, str) else listed
    if not isinstance(listed, list | tuple):
        raise DataError(f"{row.where}: references is expected to be a list of texts, not {type(listed).__name__}")
    references = [string(text, f"references[{index}]", row) for index, text in enumerate(listed)]
    name = _one(TARGETS, values, row, columns, "target") if values.keys() & {*TARGETS} else None
    answers = [*([] if name is None else [string(values[name], name, row)]), *references]
    if not answers:
        raise DataError(
            f"{row.where}: no target; columns found: {listing(row.values, 20)}\n  {ACCEPTED}\n"
            "  or say which column is which: columns: {source: ..., target: ...}"
        )
    if not answers[0].strip():
        raise DataError(
            f"{row.where}: {name or 'references'} is empty, so there is nothing to train on\n"
            "  remove the row, or give it an answer"
        )
    return source, tuple(dict.fromkeys(answers))


def _source(row: Row, values: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    if "instruction" in values and not {*columns} & {*SOURCES} - {"input"}:  # as alpaca's rows
        parts = [string(values[name], name, row) for name in ("instruction", "input") if name in values]
        return "\n\n".join(part for part in parts if part)
    if not values.keys() & {*SOURCES}:
        chat = next((name for name in ("messages", "conversations") if name in values), None)
        if chat is not None:
            raise DataError(
                f"{row.where}: {chat}: an encoder reads one text, not turns\n"
                "  give rows with source and target, or train a decoder-only model (task: causal_lm)"
            )
        languages = row.values.get("translation")
        pair = [*languages][:2] if isinstance(languages, dict) and len(languages) > 1 else ["...", "..."]
        raise DataError(
            f"{row.where}: no source; columns found: {listing(values, 20) or 'none'}\n  {ACCEPTED}\n"
            f"  or say which column is which: columns: {{source: {pair[0]}, target: {pair[1]}}}"
        )
    name = _one(SOURCES, values, row, columns, "source")
    return string(values[name], name, row)


def _one(names: Sequence[str], values: Mapping[str, Any], row: Row, columns: Mapping[str, str], side: str) -> str:
    """Return the column of one side: the one that `columns` names, or else the only one."""
    found = [name for name in names if name in columns] or [name for name in names if name in values]
    if len(found) > 1:
        raise DataError(
            f"{row.where}: {' and '.join(found)} could each be the {side}\n  say which: columns: {{{side}: {found[0]}}}"
        )
    return found[0]


def _limit(texts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, given: int | Literal["auto"]) -> Limit:
    lengths = [len(ids) for ids in texts]
    limit, reason = length_limit(lengths, tokenizer, given, "drop")
    return Limit(limit, reason, lengths)


def _encoded(row: Row, ids: list[int], side: str) -> list[int]:
    if not ids:
        raise DataError(f"{row.where}: its {side} is empty: the tokenizer makes no tokens of it\n  remove the row")
    return ids


def _unused(row: Row, columns: Mapping[str, str]) -> list[str]:
    """List the columns that nothing reads."""
    read = {*OURS, *columns.values(), WEIGHT, *(("translation",) if columns else ())}
    return [name for name, value in row.values.items() if value is not None and name not in read]
