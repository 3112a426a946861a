"""What a row means, told from its columns: a prompt with its completion, a conversation, or plain text.

    prompt/completion   (TRL)             prompt + completion, as texts or both as lists of messages
    alpaca              (Stanford)        instruction, input, output; LLaMA-Factory's system and history
    messages            (OpenAI)          messages: [{role, content}, ...]
    conversations       (ShareGPT)        conversations: [{from, value}, ...]
    text                                  text

All rows of a dataset have one shape. Whatever the shape, an `Example` is a tuple of messages, each of which says whether
it is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorakit.data import turns
from lorakit.data.parse import Row
from lorakit.data.turns import Message
from lorakit.errors import DataError, did_you_mean, listing

PROMPTS = ("prompt", "question", "input")
COMPLETIONS = ("completion", "response", "answer", "output")

# What each shape reads, in order of preference: a row that also has a column of a later shape (alpaca files often carry a
# ready-made `text`) is of the earlier one.
COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "system", "tools"),
    "conversations": ("conversations", "system", "tools"),
    "alpaca": ("instruction", "output", "input", "system", "history"),
    "prompt/completion": (*PROMPTS, *COMPLETIONS, "references"),
    "text": ("text",),
}

ACCEPTED = """accepted shapes:
    prompt/completion   prompt (or question, input) and completion (or response, answer, output);
                        or prompt and references, a list of right answers
    alpaca              instruction and output; input, system and history may be there
    messages            messages: a list of {"role", "content"}
    conversations       conversations: a list of {"from", "value"}
    text                text"""


@dataclass(frozen=True)
class Example:
    """One row, understood. `references` are all right answers where the data has several; `tools` goes to the template."""

    kind: Literal["text", "completion", "chat"]
    messages: tuple[Message, ...]
    row: Row
    references: tuple[str, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()


def read_examples(rows: Sequence[Row], columns: Mapping[str, str] | None = None) -> tuple[str, list[Example]]:
    """The shape of `rows` and their examples. `columns` maps our names to the file's, as in {"prompt": "question_en"}."""
    if not rows:
        raise DataError("no rows: there is nothing to tell a shape from")
    columns = dict(columns or {})
    _check_columns(columns, rows[0])
    shape = ""
    examples = []
    for row in rows:
        values = _renamed(row, columns)
        found = _shape_of(values, columns, row)
        if shape and found != shape:
            raise DataError(
                f"{row.where}: its shape is {found} ({listing(row.values)}), but the rows before are {shape}; one dataset has one shape"
            )
        shape = found
        examples.append(_example(shape, values, row))
    return shape, examples


def _check_columns(columns: Mapping[str, str], first: Row) -> None:
    ours = list(dict.fromkeys(name for names in COLUMNS.values() for name in names))
    for our, theirs in columns.items():
        if our not in ours:
            raise DataError(f"columns: '{our}' is not a column lorakit reads{did_you_mean(our, ours)}\n  known: {', '.join(ours)}")
        if theirs not in first.values:
            raise DataError(
                f"{first.where}: no column '{theirs}' (columns: {our}: {theirs}){did_you_mean(theirs, first.values)}\n"
                f"  columns found: {listing(first.values, 20)}"
            )


def _renamed(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """The row's values under our names; those that hold nothing (null) are left out."""
    taken = set(columns.values())
    values = {name: value for name, value in row.values.items() if name not in taken}
    values |= {our: row.values.get(theirs) for our, theirs in columns.items()}
    return {name: value for name, value in values.items() if value is not None}


def _shape_of(values: Mapping[str, Any], columns: Mapping[str, str], row: Row) -> str:
    if {"chosen", "rejected"} <= set(values) and not set(columns.values()) & {"chosen", "rejected"}:
        raise DataError(
            f"{row.where}: preference pairs (chosen, rejected), which supervised training has no use for\n"
            "  to train on the chosen answers alone, name them: columns: {prompt: prompt, completion: chosen}"
        )
    # Columns that hold something decide; failing that, nulls count too, so that a missing completion is reported as that.
    named = (set(row.values) - set(columns.values())) | set(columns)
    for names in (set(values), named):
        for shape, reads in COLUMNS.items():
            if set(columns) <= set(reads) and _fits(shape, names):
                return shape
    known = list(row.values)
    guess = ", ".join(f"{our}: {theirs}" for our, theirs in zip(("prompt", "completion"), known)) if len(known) > 1 else "text: YOUR_COLUMN"
    raise DataError(
        f"{row.where}: unknown shape; columns found: {listing(known, 20) or 'none'}\n"
        f"  {ACCEPTED}\n"
        f"  or say which column is which, for example columns: {{{guess}}}"
    )


def _fits(shape: str, names: set[str]) -> bool:
    if shape == "alpaca":
        return {"instruction", "output"} <= names
    if shape == "prompt/completion":
        return bool(names & set(PROMPTS)) and bool(names & {*COMPLETIONS, "references"})
    return shape in names  # messages, conversations and text are named after their one column


def _example(shape: str, values: dict[str, Any], row: Row) -> Example:
    if shape == "text":
        return Example("text", (Message("assistant", _full(values, "text", row), True),), row)
    if shape == "prompt/completion":
        return _completion(values, row)
    messages = _alpaca(values, row) if shape == "alpaca" else turns.conversation(values.get(shape), shape, row)
    messages = turns.with_system(messages, _optional(values, "system", row))
    return Example("chat", turns.checked(messages, row), row, tools=turns.tools(values.get("tools"), row))


def _completion(values: dict[str, Any], row: Row) -> Example:
    prompt = _one_of(PROMPTS, values, row)
    references = _references(values, row)
    answer = _one_of(COMPLETIONS, values, row) if not references or set(COMPLETIONS) & set(values) else None
    if isinstance(values.get(prompt), list) and answer and isinstance(values.get(answer), list):
        before = tuple(Message(m.role, m.content, False) for m in turns.conversation(values[prompt], prompt, row))
        return Example("chat", turns.checked(before + turns.conversation(values[answer], answer, row), row), row, references)
    completion = _full(values, answer, row) if answer else references[0]
    return Example(
        "completion", (Message("user", _text(values, prompt, row), False), Message("assistant", completion, True)), row, references
    )


def _alpaca(values: dict[str, Any], row: Row) -> tuple[Message, ...]:
    """History first, then instruction, a blank line and the input if there is one; the answer is `output`."""
    messages = []
    history = values.get("history") or []
    pairs = isinstance(history, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history)
    if not pairs:
        raise DataError(f"{row.where}: history is expected to be a list of [instruction, answer] pairs")
    for index, (asked, answered) in enumerate(history):
        messages.append(Message("user", turns.string(asked, f"history[{index}][0]", row), False))
        messages.append(Message("assistant", turns.string(answered, f"history[{index}][1]", row), True))
    asked = "\n\n".join(part for part in (_text(values, "instruction", row), _optional(values, "input", row)) if part)
    if not asked.strip():
        raise DataError(f"{row.where}: instruction and input are both empty")
    return (*messages, Message("user", asked, False), Message("assistant", _full(values, "output", row), True))


def _one_of(names: Sequence[str], values: Mapping[str, Any], row: Row) -> str:
    """The one name of `names` that this row has, or has as a null."""
    found = [name for name in names if name in values] or [name for name in names if name in row.values]
    if not found or names[0] in found:
        return names[0]
    if len(found) > 1:
        raise DataError(
            f"{row.where}: {' and '.join(found)} could each be the {names[0]}\n  say which: columns: {{{names[0]}: {found[0]}}}"
        )
    return found[0]


def _references(values: Mapping[str, Any], row: Row) -> tuple[str, ...]:
    references = values.get("references", [])
    references = [references] if isinstance(references, str) else references
    if not isinstance(references, list | tuple):
        raise DataError(f"{row.where}: references is expected to be a list of texts, not {type(references).__name__}")
    texts = tuple(turns.string(text, f"references[{index}]", row) for index, text in enumerate(references))
    if any(not text.strip() for text in texts):
        raise DataError(f"{row.where}: references[{[bool(t.strip()) for t in texts].index(False)}] is empty")
    if "references" in values and not texts and not set(COMPLETIONS) & set(values):
        raise DataError(f"{row.where}: references is empty and there is no completion: nothing to train on")
    return texts


def _text(values: Mapping[str, Any], name: str, row: Row) -> str:
    return turns.string(values.get(name), name, row)


def _full(values: Mapping[str, Any], name: str, row: Row) -> str:
    text = _text(values, name, row) if values.get(name) is not None else ""
    if not text.strip():
        raise DataError(f"{row.where}: {name} is empty: there is nothing to train on\n  take the row out, or give it an answer")
    return text


def _optional(values: Mapping[str, Any], name: str, row: Row) -> str:
    return _text(values, name, row) if values.get(name) is not None else ""
