"""Split an answer into content and blocks that begin and end with given texts, each text piece by piece.

Time is linear in the answer's length: a block is searched for its end once, and joined once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..partial_end import partial_end
from .syntax import ParsedCall, Part, Tools

# The text between begin and end -> its calls, and content between them; None: it is no call.
Parse = Callable[[str], Sequence[Part] | None]


def tool_call_blocks(read: Callable[[str, Tools], ParsedCall | None]) -> Callable[[Tools], Blocks]:
    """Return the splitter of a syntax with one call in each <tool_call> block. read(text, tools): that call."""

    def blocks(tools: Tools) -> Blocks:
        def parse(text: str) -> list[ParsedCall] | None:
            call = read(text, tools)
            return None if call is None else [call]

        return Blocks(["<tool_call>"], ["</tool_call>"], parse)

    return blocks


class Blocks:
    """The splitter of most syntaxes.

    begin: the texts that begin a block. end: those that end it; without any it lasts to the answer's end. parse: reads
    the text between; what it cannot read stays content, its markers too. at_start: only an answer that begins with a
    block (after whitespace) has one. keep_begin: parse gets the begin text too.
    """

    def __init__(
        self,
        begin: Sequence[str],
        end: Sequence[str],
        parse: Parse,
        *,
        at_start: bool = False,
        keep_begin: bool = False,
    ):
        self._begin, self._end, self._parse = tuple(begin), tuple(end), parse
        self._at_start, self._keep_begin = at_start, keep_begin
        self._longest_end = max(map(len, self._end), default=0)
        self._held = ""  # content that may be the start of a begin text
        self._opened: str | None = None  # the begin text of the block that is open
        self._before = ""  # at_start: the whitespace before it
        self._block: list[str] = []
        self._tail = ""  # the last characters of the block, that may be the start of an end text
        self._is_text = False  # at_start: the answer began with something else

    def feed(self, text: str) -> list[Part]:
        """Take more text of the answer. Return the content and calls that are certain."""
        found: list[Part] = []
        while text:
            text = self._in_content(text, found) if self._opened is None else self._in_block(text, found)
        return found

    def finish(self) -> list[Part]:
        """Return the rest. A block whose end was not written is read as it is: models may stop just before it."""
        held, self._held = self._held, ""
        if self._opened is None:
            return [held] if held else []
        begun, block = self._opened, "".join(self._block)
        self._opened = None
        calls = self._parse(begun + block if self._keep_begin else block)
        return [self._before + begun + block] if calls is None else list(calls)

    def _in_content(self, text: str, found: list[Part]) -> str:
        """Take text outside a block. Return what follows the begin text, "" if there is none."""
        text = self._held + text
        self._held = ""
        if self._at_start and not self._is_text:
            return self._at_the_start(text, found)
        if not self._is_text:
            at, begin = min(((text.find(b), b) for b in self._begin if b in text), default=(-1, ""))
            if at >= 0:
                if at:
                    found.append(text[:at])
                return self._open(begin, text[at + len(begin) :])
            keep = partial_end(text, self._begin)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        if text:
            found.append(text)
        return ""

    def _at_the_start(self, text: str, found: list[Part]) -> str:
        stripped = text.lstrip()
        for begin in self._begin:
            if stripped.startswith(begin):
                self._before = text[: len(text) - len(stripped)]
                return self._open(begin, stripped[len(begin) :])
        if any(begin.startswith(stripped) for begin in self._begin):
            self._held = text
            return ""
        self._is_text = True
        found.append(text)
        return ""

    def _open(self, begin: str, rest: str) -> str:
        self._opened, self._block, self._tail = begin, [], ""
        return rest

    def _in_block(self, text: str, found: list[Part]) -> str:
        """Take text inside a block. Return what follows its end, "" if it goes on."""
        assert self._opened is not None
        joined = self._tail + text
        at, end = min(((joined.find(e), e) for e in self._end if e in joined), default=(-1, ""))
        if at < 0:
            self._block.append(text)
            self._tail = joined[max(len(joined) - self._longest_end + 1, 0) :] if self._longest_end > 1 else ""
            return ""
        whole = "".join(self._block) + text  # ends with what follows the block
        rest = joined[at + len(end) :]
        block = whole[: len(whole) - len(rest) - len(end)]
        calls = self._parse(self._opened + block if self._keep_begin else block)
        found += [self._opened + block + end] if calls is None else calls
        self._opened = None
        return rest
