"""Turn lists of turns, with OpenAI's keys (role, content) or ShareGPT's (from, value), into `Message`s.

Roles become the ones chat templates know: system, user, assistant, tool. Assistant turns are trained, except one that
opens the conversation: it answers nothing, so it is context.
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
    """A turn. `role`: one that chat templates know. `trained`: its tokens count towards the loss."""

    role: str
    content: str
    trained: bool


def conversation(turns: object, column: str, row: Row) -> tuple[Message, ...]:
    """Return the messages of a list of turns, or of that list as JSON text (as in a CSV file). Raises DataError."""
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        try:
            turns = json.loads(turns)
        except json.JSONDecodeError as error:
            raise DataError(f"{row.where}: {column}, column {error.colno}: broken JSON: {error.msg}") from error
    if not isinstance(turns, list) or not turns:
        actual = "an empty list" if turns == [] else type(turns).__name__
        raise DataError(
            f'{row.where}: {column} is expected to be a list of turns such as {{"role": "user", "content": "..."}}, '
            f"not {actual}"
        )
    return tuple(_message(turn, f"{column}[{index}]", row) for index, turn in enumerate(turns))


def _message(turn: object, key: str, row: Row) -> Message:
    if not isinstance(turn, dict):
        raise DataError(
            f"{row.where}: {key} is expected to be an object with role and content, not {type(turn).__name__}"
        )
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    role = turn.get(role_key)
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(ROLES)
        hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
        raise DataError(f"{row.where}: {key}: unknown {role_key} {role!r}{hint}\n  known: {known}")
    if turn.get("tool_calls") and not turn.get(content_key):
        raise DataError(
            f"{row.where}: {key}: tool_calls without content\n"
            "  write the call as text in content, the way the model should write it"
        )
    content = string(turn.get(content_key), f"{key}.{content_key}", row)
    if ROLES[role] == "assistant" and not content.strip():
        raise DataError(
            f"{row.where}: {key}: the assistant's turn is empty, which would train the model to say nothing\n"
            "  remove the turn or the row, or give it an answer"
        )
    return Message(ROLES[role], content, ROLES[role] == "assistant")


def string(value: object, key: str, row: Row) -> str:
    """Return `value` if it is text that a tokenizer can encode. Raises DataError, naming `key`."""
    if not isinstance(value, str):
        actual = "missing or null" if value is None else f"{type(value).__name__} {str(value)[:40]}"
        raise DataError(f"{row.where}: {key} is expected to be text, but is {actual}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{row.where}: {key} has half a surrogate pair ({value[error.start]!a} at {error.start}), from a broken "
            "escape"
        ) from error
    return value


def with_system(messages: tuple[Message, ...], system: str) -> tuple[Message, ...]:
    """Prepend the text of a `system` column, unless the conversation has a system turn."""
    if not system or any(m.role == "system" for m in messages):
        return messages
    return (Message("system", system, False), *messages)


def checked(messages: tuple[Message, ...], row: Row) -> tuple[Message, ...]:
    """Mark an opening assistant turn as context. Raises DataError if no trained turn is left."""
    opening = next((i for i, m in enumerate(messages) if m.role != "system"), 0)
    messages = tuple(Message(m.role, m.content, m.trained and i != opening) for i, m in enumerate(messages))
    if not any(m.trained for m in messages):
        roles = ", ".join(m.role for m in messages)
        raise DataError(
            f"{row.where}: no assistant turn that answers anything (turns: {roles}), so there is nothing to train on"
        )
    return messages


def tools(value: object, row: Row) -> tuple[dict[str, Any], ...]:
    """Return the tool descriptions of a row, given as a list or as JSON text. Raises DataError."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except json.JSONDecodeError as error:
            raise DataError(f"{row.where}: tools, column {error.colno}: broken JSON: {error.msg}") from error
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{row.where}: tools is expected to be a list of objects, or such a list as JSON text")
    return tuple(value)
