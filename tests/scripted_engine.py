"""An engine without a model, for tests of what stands above the seam: it answers as a script says."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence

from lorakit.serve.engine import Facts, Piece, Source, Stats, TokenLogprob, Work
from lorakit.serve.errors import Busy, Cannot, EngineFailed, Stopping, TooLong, UnknownAdapter
from lorakit.serve.ticket import Ticket

ABILITIES = frozenset({"mix", "scale", "schema", "logprobs", "logit_bias", "min_p", "repetition"})


class ScriptedEngine:
    """`answer(work)` gives the ids of an answer; one piece a token. `works`: all that was submitted.

    `fail_after`: raise EngineFailed after that many tokens. `busy`: refuse; `places`: refuse more requests at once.
    `hold`: an event to wait for before each token, so that a test can look at a request while it runs. `pace`: seconds
    before each token.
    """

    def __init__(
        self,
        answer: Callable[[Work], Sequence[int]],
        context: int = 512,
        vocabulary: int = 4096,
        places: int | None = None,
    ):
        self.answer = answer
        self.facts = Facts("base", context, vocabulary, ABILITIES)
        self.works: list[Work] = []
        self.loaded: dict[str, Source] = {}
        self.pinned: set[str] = set()
        self.cancelled = 0
        self.fail_after: int | None = None
        self.busy = False
        self.hold: asyncio.Event | None = None
        self.pace = 0.0
        self.places = places
        self._tasks: set[asyncio.Task[None]] = set()
        self._users: Counter[str] = Counter()
        self._leaving: set[str] = set()
        self._changed = asyncio.Event()
        self._stopping = False
        self._answered = 0

    async def start(self) -> Facts:
        return self.facts

    def submit(self, work: Work) -> Ticket:
        if self._stopping:
            raise Stopping("the server is stopping", retry_after=2.0)
        if self.busy or (self.places is not None and len(self._tasks) >= self.places):
            raise Busy("all places are taken", retry_after=2.0)
        missing = [key for key, _ in work.choice if key not in self.loaded or key in self._leaving]
        if missing:
            raise UnknownAdapter(f"no adapter {missing[0]}")
        if len(work.choice) > 1 and "mix" not in self.facts.can:
            raise Cannot("no mixes here", "mix")
        if len(work.ids) + work.sampling.max_tokens > self.facts.context:
            raise TooLong(f"{len(work.ids)} + {work.sampling.max_tokens} tokens; the context has {self.facts.context}")
        self.works.append(work)
        keys = {key for key, _ in work.choice}
        task: asyncio.Task[None]
        ticket = Ticket(lambda: task.cancel())
        task = asyncio.create_task(self._run(work, ticket))
        self._tasks.add(task)
        self._users.update(keys)

        def done(ended: asyncio.Task[None]) -> None:
            self._tasks.discard(ended)
            self._users.subtract(keys)
            if ended.cancelled():  # before it ran at all
                ticket.put(Piece((), finish="cancelled"))
            self._changed.set()

        task.add_done_callback(done)
        return ticket

    async def _run(self, work: Work, ticket: Ticket) -> None:
        left = None if work.deadline is None else max(work.deadline - time.monotonic(), 0)
        try:
            async with asyncio.timeout(left):
                await self._answer(work, ticket)
        except TimeoutError:
            ticket.put(Piece((), finish="timeout"))
        except asyncio.CancelledError:
            self.cancelled += 1
            ticket.put(Piece((), finish="cancelled"))

    async def _answer(self, work: Work, ticket: Ticket) -> None:
        asked = work.sampling.logprobs
        ids = list(self.answer(work))
        ends = next((at for at, token in enumerate(ids) if token in work.sampling.stop_ids), None)
        kept = ids[:ends][: work.sampling.max_tokens]
        for at, token in enumerate(kept):
            if self.hold is not None:
                await self.hold.wait()
            await asyncio.sleep(self.pace)
            if self.fail_after == at:
                ticket.put(EngineFailed("the script says so"))
                return
            others = tuple((token + n, -0.5 - n) for n in range(asked or 0))
            self._answered += 1
            ticket.put(Piece((token,), () if asked is None else (TokenLogprob(token, -0.5, others),)))
        stopped = len(kept) < work.sampling.max_tokens
        ticket.put(Piece((), finish="stop" if stopped else "length"))

    async def load(self, key: str, source: Source, *, pin: bool = False) -> None:
        if key not in self.loaded:
            await asyncio.to_thread(source.read)
            self.loaded[key] = source
        (self.pinned.add if pin else self.pinned.discard)(key)

    async def unload(self, key: str) -> int:
        if key not in self.loaded:
            raise UnknownAdapter(f"no adapter {key}")
        self._leaving.add(key)
        while self._users[key]:
            self._changed.clear()
            await self._changed.wait()
        self._leaving.discard(key)
        del self.loaded[key]
        return 1

    def stats(self) -> Stats:
        return Stats(running=len(self._tasks), answer_tokens=self._answered, on_device=len(self.loaded))

    async def stop(self, drain: float) -> None:
        self._stopping = True
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=drain)
        for task in list(self._tasks):
            task.cancel()
