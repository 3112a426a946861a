"""An answer's content and tool calls in OpenAI's terms, while its text arrives."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .syntax import Part, Reasoning, Syntax, Tools


@dataclass(frozen=True)
class Call:
    """A tool call. index: its place in the answer. arguments: JSON text of an object."""

    index: int
    id: str
    name: str
    arguments: str

    def openai(self, streamed: bool = False) -> dict[str, Any]:
        """Return the call as `message.tool_calls` has it, or as a chunk's `delta.tool_calls`, which has the index."""
        call = {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}
        return {"index": self.index, **call} if streamed else call


@dataclass(frozen=True)
class ToolDelta:
    """What an answer gained: reasoning, content, calls. Each may be empty."""

    content: str = ""
    calls: tuple[Call, ...] = ()
    reasoning: str = ""  # only of families that write it apart (harmony): OpenAI-compatible servers' reasoning_content


class ToolStream:
    """Reads the calls out of one answer. With syntax None all of its text is content.

    Each call is given once, when all of it has arrived: its arguments are then known to be JSON, and a text that only
    looked like a call can still be content. Whitespace between content and calls is dropped. parallel: False keeps the
    first call only (OpenAI's `parallel_tool_calls: false`).
    """

    def __init__(self, syntax: Syntax | None, tools: Tools = (), *, parallel: bool = True):
        self._parts = None if syntax is None else syntax.parts(tools)
        self._parallel = parallel
        self._blank = ""  # whitespace that is content unless a call follows it
        self._follows_call = False
        self.count = 0  # calls so far

    @property
    def ended(self) -> bool:
        """Whether the answer is complete: it has a call, and only one is allowed. The request can be cancelled."""
        return self.count > 0 and not self._parallel

    def feed(self, text: str) -> ToolDelta:
        """Take more text of the answer. Return what is certain by now."""
        return self._delta([text] if self._parts is None else self._parts.feed(text))

    def finish(self) -> ToolDelta:
        """The answer is at its end. Return the rest."""
        last = self._delta([] if self._parts is None else self._parts.finish())
        blank, self._blank = self._blank, ""
        return last if self.count else ToolDelta(last.content + blank, last.calls, last.reasoning)

    def _delta(self, parts: Sequence[Part]) -> ToolDelta:
        content, calls, reasoning = "", list[Call](), ""
        for part in parts:
            if self.ended:
                break
            if isinstance(part, str):
                content += self._content(part)
                continue
            if isinstance(part, Reasoning):
                reasoning += part.text
                continue
            arguments = json.dumps(dict(part.arguments), ensure_ascii=False)
            calls.append(Call(self.count, f"call_{secrets.token_hex(12)}", part.name, arguments))
            self.count += 1
            self._blank, self._follows_call = "", True
        return ToolDelta(content, tuple(calls), reasoning)

    def _content(self, text: str) -> str:
        if self._parts is None:
            return text
        if self._follows_call:
            text = text.lstrip()
            self._follows_call = not text
        text = self._blank + text
        kept = text.rstrip()
        self._blank = text[len(kept) :]
        return kept


def read_calls(text: str, syntax: Syntax | None, tools: Tools = (), *, parallel: bool = True) -> ToolDelta:
    """Return content and calls of a finished answer."""
    stream = ToolStream(syntax, tools, parallel=parallel)
    first, last = stream.feed(text), stream.finish()
    return ToolDelta(first.content + last.content, first.calls + last.calls, first.reasoning + last.reasoning)
