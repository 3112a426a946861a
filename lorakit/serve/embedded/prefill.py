"""Compute the keys and values of prompts, in groups of similar length and in bounded chunks.

A prompt's last token is not fed here: the first step of the answer does that, together with all rows that decode. So
prefill needs no logits, and a prompt whose start was kept from before (`prefixes`) may need no prefill at all.

    groups = grouped(runner, [Start(request, length, keys_values), ...])
    group.advance(runner, tokens=512)      # one chunk; how many tokens were fed
    group.done, group.rows()               # each request with its keys and values, to be copied into a slot
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .prefixes import KeysValues
from .request import Request

if TYPE_CHECKING:
    from .runner import Runner

# A group's rows are padded to the longest. They are split where that would add more than a quarter; below that, another
# call costs more than the padding: 32 prompts of 12 to 64 tokens are then three or four groups.
PADDING = 1.25
PADDING_FREE = 8  # tokens; short prompts share a group
# Tokens in a chunk: at least, as smaller ones read the weights for few tokens, and at most, for the memory they take.
LEAST, MOST = 64, 2048
FIRST = 512  # tokens, while the pace is not known


class Pace:
    """How many prompt tokens the model feeds in a second: a running mean. An accelerator's calls return earlier."""

    def __init__(self) -> None:
        self._per_second: float | None = None

    def tokens(self, seconds: float) -> int:
        """Return how many to feed in `seconds`, within bounds."""
        tokens = FIRST if self._per_second is None else int(self._per_second * seconds)
        return min(max(tokens, LEAST), MOST)

    def saw(self, tokens: int, seconds: float) -> None:
        """Note how long `tokens` took. A few say little, as a call has a cost of its own."""
        if tokens >= LEAST:
            now = tokens / max(seconds, 1e-6)
            self._per_second = now if self._per_second is None else 0.7 * self._per_second + 0.3 * now


@dataclass(eq=False)
class Start:
    """A request, and the keys and values of its prompt's first `length` tokens.

    also: requests with the same prompt and adapters, such as the answers of `n=4`, for which it is computed once.
    """

    request: Request
    length: int = 0
    keys_values: KeysValues | None = None
    also: list[Request] = field(default_factory=list)

    @property
    def missing(self) -> int:
        """Tokens to be fed before the last one of the prompt."""
        return self.request.fed - self.length


def grouped(runner: Runner, starts: Sequence[Start], one_by_one: bool = False) -> list[Group]:
    """Group requests by how many tokens they miss; all of them miss some. Those without a known start are apart.

    (They need no mask, see `masks`.) one_by_one: each is a group of its own, as where the runner takes one at a time.
    """
    alone = one_by_one or runner.one_by_one
    groups: list[list[Start]] = []
    for start in sorted(starts, key=lambda s: (s.length > 0, s.missing)):
        last = groups[-1] if groups else None
        if (
            last is None
            or alone
            or (last[0].length > 0) != (start.length > 0)
            or start.missing > PADDING * last[0].missing + PADDING_FREE
        ):
            last = []
            groups.append(last)
        last.append(start)
    return [Group(runner, group) for group in groups]


class Group:
    """Prompts that are computed together, in slots of their own."""

    def __init__(self, runner: Runner, starts: Sequence[Start]):
        self.starts = list(starts)
        self.fed = 0  # tokens so far, of each row
        self.missing = max(start.missing for start in starts)
        self.slots = runner.slots(len(starts))
        for start in starts:
            self.slots.append(start.request, start.keys_values, start.length)

    @property
    def done(self) -> bool:
        """Whether all prompts are computed."""
        return self.fed >= self.missing

    @property
    def requests(self) -> list[Request]:
        """Those whose prompts these are."""
        return [request for start in self.starts for request in (start.request, *start.also)]

    def again(self, runner: Runner) -> list[Group]:
        """Return a group for each of the prompts, to be computed anew: together they cannot be."""
        return grouped(runner, self.starts, one_by_one=True)

    def drop(self, ended: Collection[Request]) -> None:
        """Drop those of `ended` that are in this group."""
        for at in range(len(self.starts) - 1, -1, -1):
            start = self.starts[at]
            start.also = [request for request in start.also if request not in ended]
            if start.request not in ended:
                continue
            if start.also:
                start.request = self.slots.rows[at] = start.also.pop()
            else:
                last = self.starts.pop()
                if at < len(self.starts):
                    self.starts[at] = last
                self.slots.remove(at)
        self.missing = max((start.missing for start in self.starts), default=0)

    def advance(self, runner: Runner, tokens: int) -> int:
        """Feed a chunk of about `tokens` over all rows. Returns how many were fed, padding included."""
        width = max(1, tokens // len(self.starts))
        if self.missing - self.fed <= 1.5 * width:  # rather than to leave a few for a call of their own
            width = self.missing - self.fed
        ids = []
        for start in self.starts:
            first = start.length + self.fed
            row = start.request.ids[first : min(first + width, start.request.fed)]
            ids.append(row + start.request.ids[-1:] * (width - len(row)))  # on the right: no token before it sees it
        runner.prefill(self.slots, ids)
        self.fed += width
        return width * len(ids)

    def rows(self) -> Iterator[tuple[Request, KeysValues]]:
        """Yield each request with the keys and values of its prompt but the last token."""
        for at, start in enumerate(self.starts):
            keys_values = self.slots.read(at, start.request.fed)
            for request in (start.request, *start.also):
                yield request, keys_values
