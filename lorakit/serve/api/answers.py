"""The answers of one request on their way: tokens to text, stop texts, tool calls, and why each ended.

pieces of tokens -> Answer -> AnswerDelta: text that may be sent now, calls, log probabilities; the last has a reason
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..engine import Choice, Piece, Sampling, TokenLogprob, Work
from ..errors import Stopping
from ..service import Service
from ..ticket import Ticket
from .errors import TimedOut
from .events import Chunks, EventStream
from .forms import Reason, Usage

if TYPE_CHECKING:
    from ..answer_text import AnswerText
    from ..tool_calls.stream import Call, ToolStream


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """What came since the last one. logprobs: of the tokens behind it. reason: set in the last delta.

    reasoning: text that the model's family writes apart from the answer.
    """

    text: str = ""
    reasoning: str = ""
    calls: Sequence[Call] = ()
    logprobs: Sequence[TokenLogprob] = ()
    reason: Reason | None = None


class Answer:
    """One answer. index: its number within the request: the prompt's number times `n`, and then its own among the `n`.

    tools: what turns text into calls, if it may call any.
    """

    def __init__(self, index: int, ticket: Ticket, text: AnswerText, tools: ToolStream | None = None):
        self.index, self.ticket, self.text = index, ticket, text
        self.tokens = 0  # that the engine computed, those of a stop text among them
        self.cached = 0
        self.logprob = 0.0  # sum over its tokens, if they are reported
        self.called = False
        self._tools = tools
        self._held: list[TokenLogprob] = []  # of tokens whose text cannot be sent yet

    async def next(self) -> AnswerDelta:
        """Wait for the next delta; not to be called after the last. Raises what the engine raised, or TimedOut."""
        while True:
            delta = self._delta(await anext(self.ticket))
            if delta is not None:
                return delta

    def _delta(self, piece: Piece) -> AnswerDelta | None:
        self.tokens += len(piece.ids)
        self.cached += piece.cached
        if piece.logprobs:
            self._held += piece.logprobs
            self.logprob += sum(token.logprob for token in piece.logprobs)
        if piece.finish == "timeout":
            raise TimedOut(f"the time for this request was over after {self.tokens} tokens of its answer")
        if piece.finish == "cancelled":
            raise Stopping(
                f"the server stopped, or nobody read this answer: it was cancelled after {self.tokens} tokens"
            )
        text = self.text.feed(piece.ids) if piece.ids else ""
        ended: Reason | None = piece.finish
        if self.text.stopped:
            ended = "stop"
            self.ticket.cancel()
        elif ended:
            text += self.text.finish()
        reasoning = ""
        calls: tuple[Call, ...] = ()
        if self._tools is not None:
            came = self._tools.feed(text)
            text, reasoning, calls = came.content, came.reasoning, came.calls
            if self._tools.ended and not ended:
                ended = "stop"
                self.ticket.cancel()
            if ended:
                rest = self._tools.finish()
                text, reasoning, calls = text + rest.content, reasoning + rest.reasoning, calls + rest.calls
            self.called = self.called or bool(calls)
        if not (text or calls or ended or reasoning):
            return None
        reason: Reason | None = "tool_calls" if ended == "stop" and self.called else ended
        held, self._held = (self._held, []) if self._held else ((), self._held)
        return AnswerDelta(text, reasoning, calls, held, reason)


async def deltas(answers: Sequence[Answer]) -> AsyncGenerator[tuple[Answer, AnswerDelta], None]:
    """Yield the deltas of several answers as they come, each answer's in order.

    All are read at once: an answer that waited for its turn would be cancelled as one that nobody reads. Close it (see
    `contextlib.aclosing`) if it is left early.
    """
    if len(answers) == 1:
        last = False
        while not last:
            delta = await answers[0].next()
            last = delta.reason is not None
            yield answers[0], delta
        return
    waiting = {asyncio.ensure_future(answer.next()): answer for answer in answers}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                answer, delta = waiting.pop(task), task.result()
                if delta.reason is None:
                    waiting[asyncio.ensure_future(answer.next())] = answer
                yield answer, delta
    finally:
        for task in waiting:
            task.cancel()


async def collected(answers: Sequence[Answer]) -> list[list[AnswerDelta]]:
    """Return all deltas of each answer, when all have ended."""
    came: dict[int, list[AnswerDelta]] = {answer.index: [] for answer in answers}
    async with aclosing(deltas(answers)) as arriving:
        async for answer, delta in arriving:
            came[answer.index].append(delta)
    return [came[answer.index] for answer in answers]


async def stream(
    answers: Sequence[Answer],
    events: EventStream,
    chunks: Chunks,
    write: Callable[[Answer, AnswerDelta], bytes],
    prompt_tokens: int,
) -> None:
    """Send the deltas as they come, to the end of all answers. write: returns a delta as events.

    An error before the first write is raised, so that it has a status of its own; a later one goes into the stream.
    """
    try:
        async with aclosing(deltas(answers)) as arriving:
            async for answer, delta in arriving:
                events.add(write(answer, delta))
                # What has arrived meanwhile, and what ends the stream, goes out with it.
                if events.full or not (answer.ticket.waiting or delta.reason):
                    await events.flush()
        events.add(chunks.last(usage(prompt_tokens, answers)))
        await events.flush(last=True)
    except Exception as error:
        if not events.begun:
            raise
        await events.fail(error)


def deadline(service: Service) -> float:
    """Return when a request that begins now must be done, on time.monotonic()'s clock."""
    return time.monotonic() + service.limits.seconds


@contextmanager
def submitted(service: Service, works: Sequence[Work]) -> Iterator[list[Ticket]]:
    """Submit works: all of them or, if one is refused, none. On the way out, those that still run are cancelled."""
    tickets: list[Ticket] = []
    try:
        for work in works:
            tickets.append(service.engine.submit(work))
        yield tickets
    finally:
        for ticket in tickets:
            ticket.cancel()


def works(ids: Sequence[int], choice: Choice, sampling: Sampling, count: int, deadline: float) -> list[Work]:
    """Return the works for several answers to one prompt. With a seed, each has its own, so that they differ."""
    ids = tuple(ids)

    def nth(number: int) -> Sampling:
        return sampling if sampling.seed is None else replace(sampling, seed=(sampling.seed + number) % 2**63)

    return [Work(ids, choice, nth(number), deadline) for number in range(count)]


def usage(prompt_tokens: int, answers: Sequence[Answer]) -> Usage:
    """Count the tokens of a request. prompt_tokens: of each prompt once, however many answers it has."""
    answered = sum(answer.tokens for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": answered,
        "total_tokens": prompt_tokens + answered,
        "prompt_tokens_details": {"cached_tokens": min(prompt_tokens, sum(answer.cached for answer in answers))},
    }
