"""Turn lists of turns, with OpenAI's keys (role, content) or ShareGPT's (from, value), into `Message`s.

Roles become the ones chat templates know: system, user, assistant, tool. Every other key of a turn (tool_calls,
reasoning_content, name, ...) stays with it for the template to read. Assistant turns are trained, except those that say
otherwise (`weight: 0`, `train: false`) and one that opens the conversation: it answers nothing, so it is context.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lorakit.data import tool_calls
from lorakit.data.parse import Row
from lorakit.errors import DataError, did_you_mean, listing

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
CALL_ROLES = ("function_call", "tool_call")  # LLaMA-Factory's and ms-swift's: the turn's text is the call, as JSON
SWITCHES = ("train", "training", "loss")  # axolotl's and ms-swift's: false keeps a turn out of the loss
TEXT_PARTS = ("text", "input_text", "output_text")  # the later two in OpenAI's Responses
MEDIA = ("image", "image_url", "input_image", "video", "video_url", "audio", "audio_url", "input_audio", "file")
NOT_A_CALL = "a function_call turn is not a call as JSON, so it is trained as plain text"


@dataclass(frozen=True)
class Message:
    """A turn. `role`: one that chat templates know. `trained`: its tokens count towards the loss.

    content: its text, "" where it has none. given: the turn as the data has it, with every key that a template may
    read; nulls and the keys that say whether it is trained are left out. note: what the user should know of it.
    """

    role: str
    content: str
    trained: bool
    given: Mapping[str, Any] = field(default_factory=dict)
    note: str | None = None

    @property
    def turn(self) -> dict[str, Any]:
        """The turn as a dict for a template."""
        return dict(self.given) or {"role": self.role, "content": self.content}

    def without(self, key: str) -> Message:
        """The same turn without one of its keys."""
        return replace(self, given={name: value for name, value in self.turn.items() if name != key})


def conversation(turns: object, column: str, row: Row, media: Collection[str] = ()) -> tuple[Message, ...]:
    """Return the messages of a list of turns, or of that list as JSON text (as in a CSV file). Raises DataError.

    media: types of parts besides text that a content may have.
    """
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = tool_calls.loaded(turns, column, row)
    if not isinstance(turns, list) or not turns:
        actual = "an empty list" if turns == [] else type(turns).__name__
        raise DataError(
            f'{row.where}: {column} is expected to be a list of turns such as {{"role": "user", "content": "..."}}, '
            f"not {actual}"
        )
    return tuple(_message(turn, f"{column}[{index}]", row, media) for index, turn in enumerate(turns))


def _message(turn: object, key: str, row: Row, media: Collection[str]) -> Message:
    if not isinstance(turn, dict):
        raise DataError(
            f"{row.where}: {key} is expected to be an object with role and content, not {type(turn).__name__}"
        )
    openai = turn.get("from") is None or (turn.get("role") is not None and "content" in turn)
    role_key, content_key = ("role", "content") if openai else ("from", "value")
    given_role = turn.get(role_key)
    if not isinstance(given_role, str) or given_role not in ROLES:
        known = ", ".join(ROLES)
        hint = did_you_mean(given_role, ROLES) if isinstance(given_role, str) else ""
        raise DataError(f"{row.where}: {key}: unknown {role_key} {given_role!r}{hint}\n  known: {known}")
    role, content = ROLES[given_role], _without_nulls(turn.get(content_key))
    # Parquet files and datasets fill every key that one turn of the data has with nulls in all the others.
    others = {name: value for name, value in turn.items() if value is not None and name not in (role_key, content_key)}
    if not openai and others.keys() & {"role", "content"}:
        raise DataError(
            f"{row.where}: {key} has from and value, but also {listing(others.keys() & {'role', 'content'})}\n"
            "  remove one of the two"
        )
    trained = _is_trained(others, role, key, row)
    note = None
    if given_role in CALL_ROLES:
        calls = tool_calls.of_text(content)
        if calls is None:
            note = NOT_A_CALL
        else:
            others, content = others | {"tool_calls": calls}, None
    others = tool_calls.checked(others, role, key, row)
    is_object = role == "tool" and isinstance(content, dict)  # a result as the tool gave it
    shown = json.dumps(content, ensure_ascii=False) if is_object else content
    text = "" if content is None and others.get("tool_calls") else _text_of(shown, f"{key}.{content_key}", row, media)
    if trained and not (text.strip() or others.get("tool_calls") or other_parts(content)):
        raise DataError(
            f"{row.where}: {key}: the assistant's turn is empty, which would train the model to say nothing\n"
            "  remove the turn or the row, or give it an answer"
        )
    template_role = given_role if given_role == "developer" else role
    given = {"role": template_role} | ({} if content is None else {"content": content}) | others
    return Message(role, text, trained, given, note)


def _is_trained(others: dict[str, Any], role: str, key: str, row: Row) -> bool:
    """Whether a turn is trained; takes the keys that say so out of `others`. Raises DataError for a fraction."""
    found = {name: others.pop(name) for name in ("weight", *SWITCHES) if name in others}
    asked = {name: on_or_off(value, f"{key}.{name}", row) for name, value in found.items()}
    if role != "assistant":
        demanded = [name for name in SWITCHES if asked.get(name)]
        if demanded:
            raise DataError(
                f"{row.where}: {key}.{demanded[0]} asks to train a turn of role {role}; only the assistant's turns are "
                "trained\n"
                "  take the key out, or train on all tokens with --train-on all"
            )
        return False
    return all(asked.values())


def on_or_off(value: object, key: str, row: Row) -> bool:
    """Read a weight of 0 or 1, as a number, a truth value or text. Raises DataError for any other."""
    text = str(value).strip().lower()
    if text in ("1", "1.0", "true"):
        return True
    if text in ("0", "0.0", "false"):
        return False
    raise DataError(
        f"{row.where}: {key} is {value!r}; expected 1 (trained) or 0 (context, not trained), as every trained token "
        "counts the same here\n"
        "  use 0 or 1, or rename the key if it means something else"
    )


def _text_of(content: object, key: str, row: Row, media: Collection[str]) -> str:
    """Return the text of a turn's content: a text, or a list of parts. Raises DataError for media not in `media`."""
    if not isinstance(content, list):
        return string(content, key, row)
    texts = []
    for index, part in enumerate(content):
        if isinstance(part, str):
            texts.append(string(part, f"{key}[{index}]", row))
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if (kind in MEDIA and kind not in media) or not isinstance(part, dict):
            what = f"of type {kind}" if isinstance(part, dict) else f"a {type(part).__name__}"
            raise DataError(
                f"{row.where}: {key}[{index}] is {what}; {key} is expected to be text, or a list of parts of text\n"
                "  this task trains text only: take the part out"
            )
        if is_text(part):
            texts.append(string(part["text"], f"{key}[{index}].text", row))
    return "".join(texts)


def _without_nulls(content: object) -> object:
    """Return a content whose parts have no nulls: some templates take a part with the key "image_url" for an image."""
    if not isinstance(content, list):
        return content
    return [
        {name: value for name, value in part.items() if value is not None or (name == "text" and is_text(part))}
        if isinstance(part, dict)
        else part
        for part in content
    ]


def is_text(part: object) -> bool:
    """Whether a part of a content is text of the turn; a part of reasoning may have a "text" too."""
    if not isinstance(part, dict):
        return isinstance(part, str)
    return "text" in part and (part.get("type") or "text") in TEXT_PARTS


def other_parts(content: object) -> list[dict[str, Any]]:
    """Return the parts of a content that are not its text, such as reasoning; none where it is a text."""
    return [part for part in content if not is_text(part)] if isinstance(content, list) else []


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
    messages = tuple(replace(m, trained=False) if i == opening and m.trained else m for i, m in enumerate(messages))
    if not any(m.trained for m in messages):
        roles = ", ".join(m.role for m in messages)
        untrained = any(m.role == "assistant" and i != opening for i, m in enumerate(messages))
        why = "every assistant turn is left out of the loss (weight 0 or train false)"
        raise DataError(
            f"{row.where}: {why}, so there is nothing to train on"
            if untrained
            else f"{row.where}: no assistant turn that answers anything (turns: {roles}), so there is nothing to train "
            "on"
        )
    return messages
