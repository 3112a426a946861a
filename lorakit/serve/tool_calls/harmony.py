"""gpt-oss' answers, which are messages on channels (openai/harmony): reasoning, calls and the final text.

    <|channel|>analysis<|message|>They ask for weather.<|end|>
    <|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Rome"}<|call|>
    <|start|>assistant<|channel|>final<|message|>It is warm.<|return|>

The recipient may also follow the role: "assistant to=functions.get_weather<|channel|>commentary json". The prompt ends
with "<|start|>assistant". Final messages, and commentary for the user, are content; analysis is reasoning. Since every
answer is written so, its text is split whether the request has tools or not.
"""

from __future__ import annotations

import re

from ..partial_end import partial_end
from .syntax import ParsedCall, Part, Parts, Reasoning, Syntax, Tools, json_of

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|return|>", "<|call|>", START)
RECIPIENT = re.compile(r"to=functions\.([^\s<]+)")
REASONING = re.compile(r"<\|channel\|>\s*analysis\b")


class Messages:
    """The splitter: a header up to <|message|>, then a body up to an end, again and again."""

    def __init__(self) -> None:
        self._header: list[str] = []
        self._tail = ""  # of the header: may be the start of <|message|>
        self._in_body = False
        self._function: str | None = None  # whom the message is for
        self._is_reasoning = False
        self._call: list[str] = []
        self._held = ""  # of the body: may be the start of an end

    def feed(self, text: str) -> list[Part]:
        """Take more text of the answer. Return the content, reasoning and calls that are certain."""
        found: list[Part] = []
        while text:
            text = self._body(text, found) if self._in_body else self._head(text)
        return found

    def finish(self) -> list[Part]:
        """Return the rest. A header without a message is no message: it stays content."""
        if not self._in_body:
            rest, self._header = "".join(self._header), []
            return [rest] if rest.strip() and rest.strip() != f"{START}assistant" else []
        found: list[Part] = []
        self._take(self._held, found)
        self._end(found)
        return found

    def _head(self, text: str) -> str:
        joined = self._tail + text
        at = joined.find(MESSAGE)
        if at < 0:
            self._header.append(text)
            self._tail = joined[max(len(joined) - len(MESSAGE) + 1, 0) :]
            return ""
        header = "".join(self._header) + text
        rest = joined[at + len(MESSAGE) :]
        header = header[: len(header) - len(rest)]
        recipient = RECIPIENT.search(header)
        self._function = None if recipient is None else recipient[1]
        self._is_reasoning = REASONING.search(header) is not None
        self._header, self._tail, self._in_body, self._held, self._call = [], "", True, "", []
        return rest

    def _body(self, text: str, found: list[Part]) -> str:
        text, self._held = self._held + text, ""
        at, end = min(((text.find(e), e) for e in ENDS if e in text), default=(-1, ""))
        if at < 0:
            keep = partial_end(text, ENDS)
            self._held = text[len(text) - keep :]
            self._take(text[: len(text) - keep], found)
            return ""
        self._take(text[:at], found)
        self._end(found)
        return text[at + len(end) :]

    def _take(self, text: str, found: list[Part]) -> None:
        if not text:
            return
        if self._function is not None:
            self._call.append(text)
        else:
            found.append(Reasoning(text) if self._is_reasoning else text)

    def _end(self, found: list[Part]) -> None:
        """The message is at its end: read it if it is a call."""
        if self._function is not None:
            body = "".join(self._call)
            arguments = json_of(body) if body.strip() else {}
            found.append(ParsedCall(self._function, arguments) if isinstance(arguments, dict) else body)
        self._in_body, self._function, self._held = False, None, ""


def _parts(tools: Tools) -> Parts:
    return Messages()


def _writes(template: str) -> bool:
    return CHANNEL in template and MESSAGE in template


HARMONY = Syntax("harmony", (CHANNEL, MESSAGE, CONSTRAIN, *ENDS), _writes, _parts, always=True)
