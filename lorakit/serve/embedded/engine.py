"""`EmbeddedEngine`: the event loop's side of the engine in this process. What the model computes is in `loop`.

tiers = Tiers(model, tokenizer, device=32)
engine = EmbeddedEngine(model, base="embedded", tiers=tiers, prefixes=Prefixes(1 << 30), grammars=Grammars(tokenizer))
facts = await engine.start()
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from ..engine import Ability, Facts, Source, Stats, Work, check, choice_of
from ..errors import Busy, EngineFailed, Stopping, without_traceback
from ..threads import in_thread
from ..ticket import Ticket
from .loop import Loop
from .request import Request
from .runner import Runner
from .sampling_settings import check_sampling

if TYPE_CHECKING:
    from .grammar import Grammars
    from .prefixes import Prefixes
    from .tiers import Tiers

ABILITIES: frozenset[Ability] = frozenset({"mix", "scale", "logprobs", "logit_bias", "min_p", "repetition"})
WITH_SCHEMA: frozenset[Ability] = frozenset({*ABILITIES, "schema"})
MAX_LOGPROBS = 20


class EmbeddedEngine:
    """An `Engine` on a model of this process. The model and `tiers` belong to it until `stop` returns.

    base: its name. rows: answers that are computed at once. context: positions for prompt and answer; None or more than
    the model has: all of them. waiting: requests that may wait for a row. grammars: for `Sampling.schema`; None: it is
    refused. Raises LorakitError for a model that it cannot decode, see `Runner`.
    """

    def __init__(
        self,
        model: Any,
        *,
        base: str,
        tiers: Tiers,
        prefixes: Prefixes,
        grammars: Grammars | None = None,
        rows: int = 32,
        context: int | None = None,
        waiting: int = 256,
    ):
        self.runner = Runner(model, context)
        self.tiers, self.prefixes, self.grammars = tiers, prefixes, grammars
        self.rows, self.waiting = rows, waiting
        can = ABILITIES if grammars is None else WITH_SCHEMA
        self.facts = Facts(base, self.runner.context, self.runner.vocabulary, can, MAX_LOGPROBS)
        self._loop: Loop | None = None
        self._stopping = False

    async def start(self) -> Facts:
        """Start the thread that computes. See `Engine.start`."""
        if self._loop is not None or self._stopping:
            raise EngineFailed("the engine was started before\n  make another one", heals=False)
        loop = Loop(self.runner, self.tiers, self.prefixes, rows=self.rows, to=asyncio.get_running_loop())
        self.tiers.wake, self.tiers.has_gone = loop.wake, self.prefixes.forget
        loop.start()
        self._loop = loop
        return self.facts

    def submit(self, work: Work) -> Ticket:
        """Queue a request. See `Engine.submit`. What a row cannot do comes out of the ticket, as Cannot."""
        loop = self._running()
        check(work, self.facts)
        check_sampling(work.sampling, self.facts.vocabulary)
        if self._stopping:
            raise Stopping("the server is stopping\n  ask another one, or again when it is back", retry_after=5.0)
        if len(loop.open) >= self.rows + self.waiting:
            after = min(max(loop.counters.seconds_each / self.rows, 0.5), 60.0)
            raise Busy(
                f"all {self.rows} rows are taken and {self.waiting} requests wait\n  ask again in {after:.1f} s",
                retry_after=after,
            )
        request = Request(work, choice_of(work.choice))
        self.tiers.claim(request.keys)

        def cancel() -> None:
            request.cancelled = True
            loop.wake()

        request.ticket = Ticket(cancel)
        loop.open.add(request)
        if work.sampling.schema is None:
            loop.give(request)
        else:
            request.compiling = asyncio.create_task(self._with_grammar(loop, request, work.sampling.schema))
            loop.wake()  # it keeps the deadline meanwhile
        if loop.failed is not None:  # since the check above; its thread may not have seen this request
            request.ticket.put(loop.failed)
        return request.ticket

    async def load(self, key: str, source: Source, *, pin: bool = False) -> None:
        """Make an adapter usable. See `Engine.load`."""
        self._running()
        await self.tiers.load(key, source, pin=pin)

    async def unload(self, key: str) -> int:
        """Forget an adapter once its requests are done. See `Engine.unload`."""
        self._running()
        return await self.tiers.unload(key)

    def stats(self) -> Stats:
        """Return counts as of now."""
        in_tiers, loop = vars(self.tiers.stats()), self._loop
        if loop is None:
            return Stats(**in_tiers, alive=False)
        every, counts = list(loop.open), loop.counters
        running = sum(request.admitted > 0 for request in every)
        return Stats(
            running=running,
            waiting=len(every) - running,
            prompt_tokens=counts.prompt_tokens,
            cached_tokens=counts.cached_tokens,
            answer_tokens=counts.answer_tokens,
            last_step=counts.last_step,
            alive=loop.failed is None,
            **in_tiers,
        )

    async def stop(self, drain: float) -> None:
        """Refuse new work, give running requests `drain` seconds, cancel the rest, and end the thread."""
        self._stopping = True
        loop = self._loop
        if loop is None:
            return
        await _emptied(loop, drain)
        loop.cancel_all()
        await _emptied(loop, 60.0)  # within a step, unless the thread is stuck in one
        self._loop = None
        # A step may be stuck, and detaching takes a while.
        await in_thread(loop.close, "lorakit-close")
        await in_thread(self.tiers.close, "lorakit-close")
        if self.grammars is not None:
            self.grammars.close()

    async def _with_grammar(self, loop: Loop, request: Request, schema: str) -> None:
        try:
            assert self.grammars is not None, "checked in `_check`"
            request.matcher = await self.grammars.compiled(schema)
        except Exception as error:
            loop.refuse(request, error)
        else:
            loop.give(request)

    def _running(self) -> Loop:
        loop = self._loop
        if loop is None:
            raise EngineFailed("the engine is not running\n  call start() first; a stopped one does not start again")
        if loop.failed is not None:
            raise without_traceback(loop.failed)
        return loop


async def _emptied(loop: Loop, seconds: float) -> None:
    """Wait until no request is open, for `seconds` at most."""
    end = asyncio.get_running_loop().time() + seconds
    while loop.open and loop.failed is None and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.01)
