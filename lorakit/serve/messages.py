"""The messages of a chat request, checked: what is wrong with which one, in the words of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..data.parse import Row
from ..data.turns import SWITCHES, is_text
from ..errors import DataError, did_you_mean, listing

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
KNOWN_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "function_call", "reasoning_content", "weight"}
OTHER_KEYS = 16  # in one request, for templates that read more
ECHOES = ("refusal", "annotations", "audio")  # what clients send back of our own answers, empty


class RequestRow(Row):
    """Stands in for a row of data, so that what reads rows says "this request" in its errors."""

    @property
    def where(self) -> str:
        return "this request"


REQUEST = RequestRow({}, "request", 1)


def checked_messages(messages: object) -> list[dict[str, Any]]:
    """Return messages as data has turns. Raises DataError, naming the message, for what is invalid or not text."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        what = "an empty list" if messages in ([], ()) else f"a {type(messages).__name__}"
        raise DataError(
            f'messages is {what}; expected a list of at least one, such as {{"role": "user", "content": "..."}}'
        )
    turns = [_checked(message, f"messages[{index}]") for index, message in enumerate(messages)]
    # Whether the template writes a key is found out by rendering without it.
    others = {key for turn in turns for key in turn} - KNOWN_KEYS
    if len(others) > OTHER_KEYS:
        raise DataError(
            f"messages have {len(others)} keys that are not OpenAI's ({listing(sorted(map(str, others)), 3)}); "
            f"at most {OTHER_KEYS}"
        )
    return turns


def _checked(message: object, key: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(f"{key} is a {type(message).__name__}; expected an object with role and content")
    turn = {name: value for name, value in message.items() if value is not None}
    for name in ECHOES:
        if name in turn and not turn[name]:
            del turn[name]
    role = turn.get("role")
    if not isinstance(role, str) or role not in ROLES:
        hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
        raise DataError(f"{key}.role is {role!r}; expected one of {', '.join(ROLES)}{hint}")
    switches = [name for name in ("weight", *SWITCHES) if name in turn]
    if switches:
        raise DataError(f"{key}.{switches[0]} says what is trained, which a request for an answer cannot use")
    calls = role == "assistant" and (turn.get("tool_calls") or turn.get("function_call"))
    if "content" not in turn and not calls:
        raise DataError(f"{key}.content is missing or null; expected text, or a list of parts of type text")
    text = _text(turn.get("content", ""), f"{key}.content")
    if role == "assistant" and not text.strip() and not calls:
        turn["weight"] = 0  # an empty turn is part of the conversation, and no answer to learn from
    return turn


def _text(content: object, key: str) -> str:
    if isinstance(content, str):
        _check_characters(content, key)
        return content
    if not isinstance(content, list):
        raise DataError(f"{key} is a {type(content).__name__}; expected text, or a list of parts of type text")
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if not isinstance(part, str) and not (isinstance(part, Mapping) and is_text(dict(part))):
            raise DataError(
                f"{key}[{index}] is of type {kind}; this server takes text only\n"
                '  expected {"type": "text", "text": "..."}'
            )
        text = part if isinstance(part, str) else part["text"]
        if not isinstance(text, str):
            raise DataError(f"{key}[{index}].text is a {type(text).__name__}; expected text")
        _check_characters(text, f"{key}[{index}].text")
    return "".join(part if isinstance(part, str) else str(part["text"]) for part in content)


def _check_characters(text: str, key: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{key} has half a surrogate pair ({text[error.start]!a} at {error.start})") from error


def only_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a single user message, for an adapter that was trained on texts without turns.

    Raises DataError for a conversation: none of it may be left out silently.
    """
    if len(messages) != 1 or messages[0]["role"] != "user":
        roles = listing([str(message["role"]) for message in messages])
        raise DataError(
            f"this adapter was trained on texts without turns, so it cannot read a conversation (messages: {roles})\n"
            "  send one user message, which is continued as it is, or the whole text to /v1/completions"
        )
    return _text(messages[0].get("content", ""), "messages[0].content")
