"""Rows to answer: the shapes of `shapes`, whose answers may be missing.

    prompt/completion   prompt (or question, input)            answered after the prompt
    alpaca              instruction, input, history, system    answered after them
    messages            messages, conversations                the last turn is answered (again, if it is an answer)
    text                text                                   continued
    preferences         prompt, or the turns of chosen         answered as the chosen one is

An answer that a row has is not read: it stands in the output beside the prediction.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorakit.data import tool_calls
from lorakit.data.parse import Row
from lorakit.data.shapes import (
    ACCEPTED,
    COLUMNS,
    COMPLETIONS,
    PROMPTS,
    WEIGHT,
    Example,
    check_columns,
    one_of,
    read_examples,
)
from lorakit.data.turns import ROLES
from lorakit.errors import DataError, did_you_mean, listing

# The answer's place in a row. Only what stands before the answer is rendered (`render.Renderer.prompt`).
_STAND_IN = "."
_ANSWERS = (*COMPLETIONS, "references", "chosen", "rejected")


@dataclass(frozen=True)
class Question:
    """A row to answer: the token ids that its answer starts from."""

    ids: list[int]
    row: Row

    @property
    def size(self) -> int:
        """Its tokens."""
        return len(self.ids)

    @property
    def where(self) -> str:
        return self.row.where


def read_questions(
    rows: Sequence[Row], columns: Mapping[str, str] | None = None, as_turns: bool = False, media: Collection[str] = ()
) -> list[Example]:
    """Return an example for each row, in their order, with a stand-in for the answer.

    columns: our column name -> the file's; those of answers may be missing in the file. as_turns: prompts are a user's
    turn of a conversation. media: as for `read_examples`. Raises DataError, naming the row, for one that asks nothing.
    """
    columns = {ours: theirs for ours, theirs in (columns or {}).items() if not _is_missing_answer(ours, theirs, rows)}
    check_columns(columns, rows[0])
    asked = [replace(row, values=_asked(row, columns, as_turns)) for row in rows]
    _, examples = read_examples(asked, media=media)
    return [replace(example, row=row) for example, row in zip(examples, rows, strict=True)]


def _is_missing_answer(ours: str, theirs: str, rows: Sequence[Row]) -> bool:
    return ours in _ANSWERS and not any(theirs in row.values for row in rows)


def _asked(row: Row, columns: Mapping[str, str], as_turns: bool) -> dict[str, Any]:
    """Return a row's values under our names, with a stand-in for its answer."""
    mapped = {*columns.values()}
    values = {name: value for name, value in row.values.items() if name not in mapped and value is not None}
    values |= {ours: row.values[theirs] for ours, theirs in columns.items() if row.values.get(theirs) is not None}
    values.pop(WEIGHT, None)  # every row is answered
    for shape in ("messages", "conversations"):
        if shape in values:
            return values | {shape: _awaiting(values[shape], shape, row)}
    if "instruction" in values:
        return values | {"output": _STAND_IN}
    if isinstance(values.get("chosen"), list) and not values.keys() & {*PROMPTS}:  # a preference with its prompt
        return {"messages": _awaiting(values["chosen"], "chosen", row)}
    kept = {name: value for name, value in values.items() if name not in _ANSWERS}
    if not kept.keys() & {*PROMPTS, "text"}:
        found = listing(row.values, 20) or "none"
        hint = next(filter(None, (did_you_mean(name, (*PROMPTS, "text", "messages")) for name in row.values)), "")
        raise DataError(
            f"{row.where}: nothing to answer; columns found: {found}{hint}\n"
            f"  {ACCEPTED}\n"
            "  answers may be missing; or say which column is which: --columns prompt=YOUR_COLUMN"
        )
    text = kept.pop(one_of(PROMPTS, kept, row) if kept.keys() & {*PROMPTS} else "text")
    kept = {name: value for name, value in kept.items() if name not in PROMPTS}
    if as_turns and isinstance(text, str):
        system = [{"role": "system", "content": kept.pop("system")}] if "system" in kept else []
        turns = [*system, {"role": "user", "content": text}, {"role": "assistant", "content": _STAND_IN}]
        return {name: value for name, value in kept.items() if name in COLUMNS["messages"]} | {"messages": turns}
    return kept | {"prompt": text, "completion": _STAND_IN}


def _awaiting(turns: object, column: str, row: Row) -> object:
    """Return the turns with a last answer to give. What is not a list of turns is returned as it is."""
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = tool_calls.loaded(turns, column, row)
    if not isinstance(turns, list) or not turns or not isinstance(turns[-1], dict):
        return turns  # `read_examples` says what is wrong with it
    last = turns[-1]
    key, text = ("from", "value") if last.get("role") is None else ("role", "content")
    is_answer = ROLES.get(str(last.get(key))) == "assistant"
    return [*(turns[:-1] if is_answer else turns), {key: "assistant" if key == "role" else "gpt", text: _STAND_IN}]
