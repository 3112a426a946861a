"""Check that what a row holds reaches its text: what a chat template does not show is an error or a note.

A key of a turn is shown if the text differs without it. Calls, questions and answers that a template leaves out are an
error, as the rest would teach the wrong thing; other keys (name, tool_call_id, a reasoning that the template does not
know) are notes, which count the rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorakit.data.shapes import Example
from lorakit.data.templates import Writer
from lorakit.data.turns import Message, is_text
from lorakit.errors import DataError

PROMPT_END = 40  # characters
OTHERS = {  # of a form that every template takes
    "tool_call_id": "other0001",
    "tool_calls": [{"type": "function", "function": {"name": "another", "arguments": {"other": "another"}}}],
}
AFTER_LAST = "turns after the last trained answer are not used"
CHANGED = "the chat template leaves out part of an answer's content"
CALL_ALONE = "the chat template writes the tool calls of a turn without its content"
FIX = "  give a template that writes it (--chat-template FILE), use template plain, or take it out of the data"


@dataclass(frozen=True)
class Answer:
    """A trained turn: its index, the text before it, its own, and the template's text of the turns up to it."""

    index: int
    context: str
    text: str
    rendered: str


class Unshown:
    """Looks for what is not shown, over the rows of a dataset; remembers what the template is known to show."""

    def __init__(self, writer_of: Callable[[Example], Writer]):
        self._writer_of = writer_of
        self._known: set[tuple[str, str]] = set()

    def notes(self, example: Example, write: Writer, answers: Sequence[Answer]) -> list[str]:
        """Return what to tell of an example. Raises DataError for what must not be left out."""
        messages, last = example.messages, answers[-1]
        notes = [message.note for message in messages if message.note]
        if not any(answer.text for answer in answers):
            return []  # nothing is trained, which is an error of its own
        for answer in answers:
            notes += self._of_answer(example, write, answer)
        answered = {answer.index for answer in answers}
        others = [i for i in range(last.index) if i not in answered]
        notes += self._of_others(example, write, last, others)
        if last.index + 1 < len(messages):
            notes.append(AFTER_LAST)
        return notes + self._of_row(example, last)

    def of_prompt(self, example: Example, write: Writer) -> list[str]:
        """The same for a prompt: an example whose last message is yet to be written."""
        turns = replace(example, messages=example.messages[:-1])

        def prompt(messages: Sequence[Message], _: bool) -> str:
            return write(messages, True)

        last = Answer(len(turns.messages) - 1, "", "", prompt(turns.messages, True))
        notes = [message.note for message in turns.messages if message.note]
        notes += self._of_others(turns, prompt, last, range(len(turns.messages)))
        return notes + self._of_row(turns, last, adds_prompt=True)

    def _of_answer(self, example: Example, write: Writer, answer: Answer) -> list[str]:
        messages, where = example.messages[: answer.index + 1], example.row.where
        message, notes = messages[-1], []
        for key in _further_keys(message):
            value = message.turn[key]
            text = value.strip() if isinstance(value, str) else ""
            if text and text in answer.text and text not in message.content:
                continue
            if _is_same(write, (*messages[:-1], _without(message, key)), answer.rendered):
                notes.append(_hidden(key, "assistant", where))
        calls = message.turn.get("tool_calls", ())
        if len(calls) > 1 and _is_same(
            write, (*messages[:-1], _with(message, "tool_calls", calls[:-1])), answer.rendered
        ):
            raise DataError(f"{where}: the chat template writes only some of a turn's {len(calls)} tool_calls\n{FIX}")
        self._check_parts(messages, len(messages) - 1, write, answer.rendered, where)
        # A generation prompt may hold the beginning of the content, as one that ends with "<think>" does.
        if not has_all(answer.context[-PROMPT_END:] + answer.text, message.content):
            hidden = _is_same(write, (*messages[:-1], _emptied(message)), answer.rendered)
            if hidden and not calls:
                raise DataError(f"{where}: the chat template does not show the content of the assistant's turn\n{FIX}")
            notes.append(CALL_ALONE if hidden else CHANGED)
        return notes

    def _of_others(self, example: Example, write: Writer, last: Answer, others: Sequence[int]) -> list[str]:
        """The same for turns that are context. A key is tried in all turns of a role at once."""
        messages, where = example.messages[: last.index + 1], example.row.where
        notes = []
        keys = dict.fromkeys((messages[i].role, key) for i in others for key in _further_keys(messages[i]))
        for role, key in keys:
            if (role, key) in self._known:
                continue
            without = [_without(m, key) if i in others and m.role == role else m for i, m in enumerate(messages)]
            if _is_same(write, without, last.rendered):
                notes.append(_hidden(key, role, where))
            else:
                self._known.add((role, key))
        for i in others:
            message = messages[i]
            self._check_parts(messages, i, write, last.rendered, where)
            if message.role == "assistant" or has_all(last.rendered, message.content):
                continue  # a template may take the reasoning out of an earlier answer
            if message.role == "tool" and json.dumps(message.content, ensure_ascii=False)[1:-1] in last.rendered:
                continue
            without = [_emptied(m) if i == j else m for j, m in enumerate(messages)]
            if _is_same(write, without, last.rendered):
                if message.role != "system":
                    raise DataError(
                        f"{where}: the chat template does not show the content of a {message.role} turn\n{FIX}"
                    )
                notes.append("the chat template does not show the system turn")
            elif message.role != "tool":  # templates write results as JSON, which may look otherwise
                notes.append(f"the chat template changes the content of {message.role} turns")
        return notes

    def _check_parts(self, messages: Sequence[Message], index: int, write: Writer, rendered: str, where: str) -> None:
        """Raise DataError for a part of a content, other than text, that is not shown."""
        content = messages[index].turn.get("content")
        if not isinstance(content, list):
            return
        for at, part in enumerate(content):
            if is_text(part):
                continue
            nothing = {"type": "text", "text": ""}  # in its place, as templates may need a part
            rests = ([*content[:at], *content[at + 1 :]], [*content[:at], nothing, *content[at + 1 :]])
            fewer = [_with(messages[index], "content", rest) for rest in rests]
            if any(_is_same(write, [*messages[:index], turn, *messages[index + 1 :]], rendered) for turn in fewer):
                raise DataError(
                    f"{where}: the chat template does not show a part of type {part.get('type')} of a "
                    f"{messages[index].role} turn's content\n{FIX}"
                )

    def _of_row(self, example: Example, last: Answer, adds_prompt: bool = False) -> list[str]:
        """What a row holds beside its turns. adds_prompt: `last.rendered` ends with the generation prompt."""
        notes = []
        for name in ("tools", "documents"):
            if getattr(example, name) and ("row", name) not in self._known:
                fewer: Any = {name: ()}
                write = self._writer_of(replace(example, **fewer))
                if _is_same(write, example.messages[: last.index + 1], last.rendered, adds_prompt):
                    notes.append(column_note(name))
                else:
                    self._known.add(("row", name))
        return notes


def column_note(name: str) -> str:
    """Return the note on a column, tools or documents, that is not shown."""
    return f"the chat template does not show the column {name}"


def _further_keys(message: Message) -> list[str]:
    return [key for key in message.given if key not in ("role", "content")]


def _hidden(key: str, role: str, where: str) -> str:
    """The note for a key that is not shown. Raises DataError for calls."""
    if key == "tool_calls":
        raise DataError(f"{where}: the chat template does not show {key} of a turn\n{FIX}")
    return f"the chat template does not show '{key}' of {role} turns"


def _without(message: Message, key: str) -> Message:
    """The turn without a key. Calls and ids are exchanged instead: a turn without calls must have a content, and
    templates that need ids are given the missing ones.
    """
    return _with(message, key, OTHERS[key]) if key in OTHERS else message.without(key)


def _with(message: Message, key: str, value: object) -> Message:
    return replace(message, given={**message.turn, key: value})


def _emptied(message: Message) -> Message:
    return replace(message, content="", given={**message.turn, "content": ""})


def _is_same(write: Writer, messages: Sequence[Message], rendered: str, adds_prompt: bool = False) -> bool:
    """Whether other messages give the same text. A template that rejects them has read what they lack."""
    try:
        return write(messages, adds_prompt) == rendered
    except DataError:
        return False


def has_all(text: str, content: str) -> bool:
    """Whether a text has all of a content; line ends and spaces may differ."""
    return content.strip() in text or "".join(content.split()) in "".join(text.split())
