"""Conversations: lists of turns, in OpenAI's words (role, content) or ShareGPT's (from, value), to `Message`s.

The roles we keep are those chat templates know: system, user, assistant, tool. Assistant turns are trained, with one
exception: a turn that opens the conversation answers nothing, so it is context.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lorakit.data.parse import Row
from lorakit.errors import DataError, did_you_mean

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Message:
    role: str
    content: str
    trained: bool


def conversation(turns: object, column: str, row: Row) -> tuple[Message, ...]:
    """The messages of one row's list of turns, which may be given as JSON text (in a CSV file it can only be that)."""
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        try:
            turns = json.loads(turns)
        except json.JSONDecodeError as error:
            raise DataError(f"{row.where}: {column}, column {error.colno}: broken JSON: {error.msg}") from error
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else type(turns).__name__
        raise DataError(
            f'{row.where}: {column} is expected to be a list of turns such as {{"role": "user", "content": "..."}}, not {found}'
        )
    return tuple(_message(turn, f"{column}[{index}]", row) for index, turn in enumerate(turns))


def _message(turn: object, place: str, row: Row) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{row.where}: {place} is expected to be an object with role and content, not {type(turn).__name__}")
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    role = turn.get(role_key)
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(ROLES)
        hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
        raise DataError(f"{row.where}: {place}: unknown {role_key} {role!r}{hint}\n  known: {known}")
    if turn.get("tool_calls") and not turn.get(content_key):
        raise DataError(
            f"{row.where}: {place}: tool_calls without content\n  write the call as text in content, as the model shall write it"
        )
    content = string(turn.get(content_key), f"{place}.{content_key}", row)
    if ROLES[role] == "assistant" and not content.strip():
        raise DataError(f"{row.where}: {place}: the assistant's turn is empty: it would be trained to say nothing")
    return Message(ROLES[role], content, ROLES[role] == "assistant")


def string(value: object, place: str, row: Row) -> str:
    """`value`, which must be text that a tokenizer can take."""
    if not isinstance(value, str):
        found = "missing or null" if value is None else f"{type(value).__name__} {str(value)[:40]}"
        raise DataError(f"{row.where}: {place} is expected to be text, but is {found}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{row.where}: {place} holds half a character ({value[error.start]!a} at {error.start}), a broken escape"
        ) from error
    return value


def with_system(messages: tuple[Message, ...], system: str) -> tuple[Message, ...]:
    """A `system` column goes first, unless the conversation has its own."""
    if not system or any(m.role == "system" for m in messages):
        return messages
    return (Message("system", system, False), *messages)


def checked(messages: tuple[Message, ...], row: Row) -> tuple[Message, ...]:
    """The messages with an opening assistant turn marked as context; at least one turn must be left to train."""
    opening = next((i for i, m in enumerate(messages) if m.role != "system"), 0)
    messages = tuple(Message(m.role, m.content, m.trained and i != opening) for i, m in enumerate(messages))
    if not any(m.trained for m in messages):
        roles = ", ".join(m.role for m in messages)
        raise DataError(f"{row.where}: no assistant turn that answers something (turns: {roles}): there is nothing to train on")
    return messages


def tools(value: object, row: Row) -> tuple[dict[str, Any], ...]:
    """The functions the model may call: a list of descriptions, or the same as a JSON text; empty is none."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except json.JSONDecodeError as error:
            raise DataError(f"{row.where}: tools, column {error.colno}: broken JSON: {error.msg}") from error
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{row.where}: tools is expected to be a list of objects, or such a list as JSON text")
    return tuple(value)
