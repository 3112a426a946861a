"""Preference rows: which answers a row has, and which of them is the better one.

    a pair           prompt, chosen, rejected      texts, or messages (TRL); the prompt may be instruction and input, a
                                                   list of messages or of conversations (LLaMA-Factory)
                     chosen, rejected              conversations, or texts, with the same beginning: the prompt (TRL)
    one answer       prompt, completion, label     label: true if it is desirable, false if it is not (KTO)
                     messages, label               the last assistant turn is the answer (LLaMA-Factory)

Each answer becomes an `Example`, as in supervised training, so that templates and end tokens are the same there.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import DataError, did_you_mean, listing
from . import turns
from .columns import is_truth
from .parse import Row
from .shapes import COLUMNS, COMPLETIONS, CONTEXT, PROMPTS, WEIGHT, Example, read_examples, weighs

PAIR, ONE = ("chosen", "rejected"), "label"
CONVERSATIONS = ("conversations", "messages")
_OURS = tuple(dict.fromkeys([*PAIR, ONE, *PROMPTS, *COMPLETIONS, *CONVERSATIONS, *COLUMNS["alpaca"], *CONTEXT]))
EXPECTED = """expected one of
    prompt, chosen, rejected      as texts or messages; or chosen and rejected alone, with the same beginning
    prompt, completion, label     label: true if the answer is desirable, false if it is not; or messages and label"""


@dataclass(frozen=True)
class Preference:
    """A row's answers, each with its prompt: (chosen, rejected), or a single one that is desirable or not."""

    answers: tuple[Example, ...]
    desirable: bool | None
    row: Row
    unused: tuple[str, ...]


def is_pair(values: Mapping[str, Any]) -> bool:
    """Whether a row has a chosen and a rejected answer."""
    return set(PAIR) <= values.keys()


def is_preference(values: Mapping[str, Any]) -> bool:
    """Whether a row can be nothing but a preference: a pair, or an answer with a truth value as its label."""
    return is_pair(values) or (isinstance(values.get(ONE), bool) and _is_answered(values))


def may_be_preference(values: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> bool:
    """Whether a row is an answer with a label that may say whether it is desirable, such as 0 or "True": a language
    model could learn the answer too, with the label as a column that nothing reads. `rows`: the data's first rows.
    """
    labels = [each[ONE] for each in rows or [values] if each.get(ONE) is not None]
    return _is_answered(values) and not is_pair(values) and bool(labels) and all(map(is_truth, labels))


def _is_answered(values: Mapping[str, Any]) -> bool:
    return bool(set(CONVERSATIONS) & values.keys()) or {"prompt", "completion"} <= values.keys()


def read_preferences(rows: Sequence[Row], columns: Mapping[str, str] | None = None) -> tuple[str, list[Preference]]:
    """Return the shape of `rows` and the preferences of those whose weight is not 0.

    columns: our column name -> the file's. Raises DataError, naming file and row.
    """
    if not rows:
        raise DataError("no rows; expected at least one")
    renamed = [_renamed(row, columns or {}) for row in rows]
    found: list[tuple[Row, dict[str, Any], list[Row], bool | None, set[str]]] = []
    for row, values in zip(rows, renamed, strict=True):
        if not weighs(values, row):
            continue
        answers, desirable, used = _pair(values, row) if is_pair(values) else _one(values, row)
        if found and (found[0][3] is None) != (desirable is None):
            raise DataError(
                f"{row.where}: it has {_kind(desirable)}, but the rows before it have {_kind(found[0][3])}; all rows "
                "of a data set must be of one kind"
            )
        found.append((row, values, answers, desirable, used))
    if not found:
        raise DataError(f"{rows[0].file}: every row has {WEIGHT} 0, so there is nothing to train on")
    shape, examples = read_examples([answer for _, _, answers, _, _ in found for answer in answers])
    each, preferences = iter(examples), []
    for row, values, answers, desirable, used in found:
        own = tuple(replace(next(each), row=row) for _ in answers)
        unused = dict.fromkeys([*(name for name in values if name not in used), *own[0].unused])
        preferences.append(Preference(own, desirable, row, tuple(unused)))
    of = "chosen, rejected" if found[0][3] is None else "label"
    return f"{of} ({shape})", preferences


def _kind(desirable: bool | None) -> str:
    return "a pair, chosen and rejected" if desirable is None else "one answer and its label"


def _renamed(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the row's values under our names, without nulls."""
    for ours, theirs in columns.items():
        if ours not in _OURS:
            raise DataError(
                f"columns: '{ours}' is not a column of preference rows{did_you_mean(ours, _OURS)}\n"
                f"  known: {', '.join(_OURS)}"
            )
        if theirs not in row.values:
            raise DataError(
                f"{row.where}: no column '{theirs}' (columns: {ours}: {theirs}){did_you_mean(theirs, row.values)}"
            )
    values = {name: value for name, value in row.values.items() if name not in columns.values()}
    values |= {ours: row.values[theirs] for ours, theirs in columns.items()}
    return {name: value for name, value in values.items() if value is not None}


# ------------------------------------------------------------------------------------- one answer


def _one(values: Mapping[str, Any], row: Row) -> tuple[list[Row], bool, set[str]]:
    """Return the row of a labelled answer, its label, and the columns that are used."""
    missing = [name for name in PAIR if name not in values]
    if len(missing) == 1:
        raise DataError(f"{row.where}: no {missing[0]}, but {PAIR[PAIR[0] == missing[0]]}: a pair needs both")
    if ONE not in values:
        names = listing(row.values, 20) or "none"
        raise DataError(f"{row.where}: no preference; columns found: {names}\n  {EXPECTED}")
    desirable = _desirable(values[ONE], row)
    own = {name: value for name, value in values.items() if name in _OURS and name != ONE}
    return [Row(own, row.file, row.number)], desirable, {ONE, *own}


def _desirable(label: object, row: Row) -> bool:
    text = str(label).strip().lower()
    if text in ("true", "1", "1.0"):
        return True
    if text in ("false", "0", "0.0"):
        return False
    raise DataError(
        f"{row.where}: {ONE} is {label!r}; expected true for a desirable answer, false for an undesirable one"
    )


# ------------------------------------------------------------------------------------- pairs


def _pair(values: Mapping[str, Any], row: Row) -> tuple[list[Row], None, set[str]]:
    """Return the rows of a pair's two answers, and the columns that are used."""
    chosen, rejected = (_answer(values[name], name, row) for name in PAIR)
    prompt, used = _prompt(values, row)
    parted: tuple[Any, Any, Any]  # the prompt and the answers, texts or turns
    if isinstance(chosen, str) and isinstance(rejected, str):
        parted = (prompt, chosen, rejected) if prompt is not None else _parted_texts(chosen, rejected, row)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        parted = _parted_turns(prompt, chosen, rejected, row)
    else:
        kinds = ["a text" if isinstance(answer, str) else "messages" for answer in (chosen, rejected)]
        raise DataError(f"{row.where}: chosen is {kinds[0]} and rejected is {kinds[1]}; expected two of one kind")
    asked, *answers = parted
    for name, answer in zip(PAIR, answers, strict=True):
        if not (answer.strip() if isinstance(answer, str) else answer):
            raise DataError(
                f"{row.where}: {name} is empty, so it is no answer to the prompt\n  remove the row, or give it one"
            )
    context = {name: values[name] for name in CONTEXT if name in values}
    rows = [Row({"prompt": asked, "completion": answer, **context}, row.file, row.number) for answer in answers]
    return rows, None, {*PAIR, *used, *context}


def _answer(value: object, name: str, row: Row) -> str | list[dict[str, Any]]:
    """Return an answer: a text, or turns, also where they are given as one turn or as JSON text."""
    found: Any = value
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        with contextlib.suppress(json.JSONDecodeError):  # else it is a text that begins so
            found = json.loads(value)
    if isinstance(found, str):
        return turns.string(found, name, row)
    found = [found] if isinstance(found, dict) else found
    turns.conversation(found, name, row)  # for errors that name this column
    return list(found)


def _prompt(values: Mapping[str, Any], row: Row) -> tuple[str | list[dict[str, Any]] | None, set[str]]:
    """Return the prompt, a text or turns, and the columns it is in. None: it is the beginning of the answers."""
    if "instruction" in values:
        parts = [turns.string(values[name], name, row) for name in ("instruction", "input") if values.get(name)]
        asked = "\n\n".join(parts)
        if not asked.strip():
            raise DataError(f"{row.where}: instruction and input are both empty")
        history = values.get("history") or []
        if not isinstance(history, list) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in history):
            raise DataError(f"{row.where}: history is expected to be a list of [instruction, answer] pairs")
        roles = ("user", "assistant")
        before = [{"role": role, "content": said} for pair in history for role, said in zip(roles, pair, strict=True)]
        return [*before, {"role": "user", "content": asked}], {"instruction", "input", "history"}
    names = [name for name in (*PROMPTS, *CONVERSATIONS) if name in values]
    if not names:
        return None, set()
    name = names[0]
    if len(names) > 1 and name != "prompt":
        raise DataError(
            f"{row.where}: {' and '.join(names)} could each be the prompt\n  say which: columns: {{prompt: {name}}}"
        )
    value = _answer(values[name], name, row)
    if isinstance(value, str) and not value.strip():
        raise DataError(f"{row.where}: {name} is empty, so there is nothing to answer\n  remove the row")
    return value, {name}


def _parted_texts(chosen: str, rejected: str, row: Row) -> tuple[str, str, str]:
    """Part two texts at the last space or line end of their common beginning, which is the prompt."""
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    at = next((i for i in range(same, 0, -1) if chosen[i - 1].isspace()), 0)
    while at > 0 and chosen[at - 1] == " ":  # a word's token has the space before it
        at -= 1
    if at == 0:
        raise DataError(
            f"{row.where}: chosen and rejected have no common beginning, and there is no prompt: their prompts differ\n"
            "  give a prompt column, or correct the row"
        )
    return chosen[:at], chosen[at:], rejected[at:]


def _parted_turns(
    prompt: str | list[dict[str, Any]] | None, chosen: list[Any], rejected: list[Any], row: Row
) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the turns of the prompt, and those that are left of each answer."""
    plain = [[_compared(turn) for turn in each] for each in (chosen, rejected)]
    same = next((i for i, (a, b) in enumerate(zip(*plain)) if a != b), min(map(len, plain)))
    if isinstance(prompt, list):
        own = [_compared(turn) for turn in prompt]
        starts = [each[: len(own)] == own for each in plain]
        if all(starts):
            return prompt, chosen[len(own) :], rejected[len(own) :]
        if any(starts) or same:
            raise DataError(
                f"{row.where}: chosen and rejected are conversations that do not both begin with the prompt: their "
                "prompts differ\n  give the answers alone, or remove the prompt column"
            )
        return prompt, chosen, rejected
    if same == 0:
        if isinstance(prompt, str) and len(chosen) == len(rejected) == 1:
            return [{"role": "user", "content": prompt}], chosen, rejected
        raise DataError(
            f"{row.where}: the conversations chosen and rejected differ in their first turn: their prompts differ\n"
            "  correct the row, or give the answers alone and a prompt column"
        )
    same = min(same, len(chosen) - 1, len(rejected) - 1) if plain[0] == plain[1] else same  # equal: their last turns
    if isinstance(prompt, str) and prompt.strip() not in "".join(str(text) for _, text, _ in plain[0][:same]):
        raise DataError(
            f"{row.where}: the prompt is not in the turns that chosen and rejected begin with: their prompts differ\n"
            "  remove the prompt column, or correct the row"
        )
    for name, each in (("chosen", plain[0]), ("rejected", plain[1])):
        if same < len(each) and turns.ROLES[each[same][0]] != "assistant":
            raise DataError(
                f"{row.where}: {name}[{same}], where the conversations part, is a turn of role {each[same][0]}: their "
                "prompts differ\n  expected that only the assistant's answers differ"
            )
    return chosen[:same], chosen[same:], rejected[same:]


def _compared(turn: Mapping[str, Any]) -> tuple[Any, Any, str]:
    """Return what makes turns the same: role, content, and the other keys."""
    role = turn.get("role") if turn.get("role") is not None else turn.get("from")
    content = turn.get("content") if "content" in turn else turn.get("value")
    others = {k: v for k, v in turn.items() if v is not None and k not in ("role", "from", "content", "value")}
    return role, content, json.dumps(others, sort_keys=True, default=str)
