"""The segments of a long conversation's prompt, from windows of a few turns instead of all its prefixes.

A prompt has a border wherever an answer begins or ends, and a border lies where the renderings of two prefixes part.
For n answers that is 2n renderings of up to n turns: 11 s for 500 answers. Most templates write each turn after the
ones before it, looking back at most to the turn that a tool answers. For these the same differences are found in
windows that begin at the user's turn before the previous answer:

    write(window up to answer k-1) | context of answer k | answer k          0.1 s for 500 answers

This is a guess that is checked: the pieces, joined, have to be the beginning of the prompt that the template writes for
all turns, with the first, the middle and the last answer exactly where their own prefixes put them. If not, None is
returned, and the prefixes decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from lorakit.errors import DataError

if TYPE_CHECKING:
    from lorakit.data.templates import Writer
    from lorakit.data.turns import Message

MIN_ANSWERS = 9  # up to 8, prefixes cost as little


def windowed(
    messages: Sequence[Message], answered: Sequence[int], write: Writer, prompt: str
) -> list[tuple[str, str]] | None:
    """Return (context, answer) of each answered turn: their texts, joined, begin `prompt`. None if that fails.

    messages: those before the next answer. answered: indices of turns of the assistant, increasing.
    """
    try:
        pieces = [(write(messages[: answered[0]], True), "")]
        pieces[0] = (pieces[0][0], _added(pieces[0][0], write(messages[: answered[0] + 1], False)))
        for previous, index in pairwise(answered):
            pieces.append(_piece(messages, previous, index, write))
        ends = _ends(pieces)
        if not prompt.startswith("".join(context + answer for context, answer in pieces)):
            return None
        for position in (len(answered) // 2, len(answered) - 1):
            index, (start, end) = answered[position], ends[position]
            if write(messages[:index], True) != prompt[:start] or write(messages[: index + 1], False) != prompt[:end]:
                return None
    except (_Parted, DataError):  # a template may reject a window that it would take as part of more
        return None
    return pieces


def _piece(messages: Sequence[Message], previous: int, index: int, write: Writer) -> tuple[str, str]:
    """Return context and text of the answer at `index`, seen from the user's turn before the `previous` answer on."""
    start = next((at for at in range(previous, -1, -1) if messages[at].role == "user"), 0)
    system = [message for message in messages[:start] if message.role == "system"]
    window, shift = [*system, *messages[start : index + 1]], len(system) - start
    before = write(window[: previous + 1 + shift], False)
    context = write(window[: index + shift], True)
    return _added(before, context), _added(context, write(window, False))


def _added(before: str, after: str) -> str:
    """Return what a text has after another one. Raises _Parted if it does not begin with it."""
    if not after.startswith(before):
        raise _Parted
    return after[len(before) :]


def _ends(pieces: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
    """Return where each answer begins and ends in the prompt, in characters."""
    found, at = [], 0
    for context, answer in pieces:
        found.append((at + len(context), at + len(context) + len(answer)))
        at = found[-1][1]
    return found


class _Parted(Exception):
    """Two renderings part where one should go on."""
