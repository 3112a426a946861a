"""How much of a text has to be held back because it may be the start of something, while more of it arrives."""

from __future__ import annotations

from collections.abc import Iterable


def partial_end(text: str, beginnings: Iterable[str]) -> int:
    """Return the length of the longest ending of a text that is the start, and not all, of one of some texts.

    "Hello <to" and "<tool_call>": 3. 0 if there is none.
    """
    longest = 0
    for beginning in beginnings:
        at = max(len(text) - len(beginning) + 1, 0)
        while at < len(text) - longest and (at := text.find(beginning[0], at, len(text) - longest)) >= 0:
            if beginning.startswith(text[at:]):
                longest = len(text) - at
                break
            at += 1
    return longest
