"""`EmbeddedEngine`: the event loop's side of the engine in this process. What the model computes is in `loop`.

tiers = Tiers(model, tokenizer, device=32)
engine = EmbeddedEngine(model, base="embedded", tiers=tiers, prefixes=Prefixes(1 << 30), grammars=Grammars(tokenizer))
facts = await engine.start()
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from ..engine import Ability, Choice, Facts, Source, Stats, Work
from ..errors import Busy, Cannot, EngineFailed, TooLong
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
        self._compiling: set[asyncio.Task[None]] = set()

    async def start(self) -> Facts:
        """Start the thread that computes. See `Engine.start`."""
        if self._loop is not None or self._stopping:
            raise EngineFailed("the engine was started before\n  make another one", heals=False)
        loop = Loop(self.runner, self.tiers, self.prefixes, rows=self.rows, to=asyncio.get_running_loop())
        self.tiers.wake = loop.wake
        loop.start()
        self._loop = loop
        return self.facts

    def submit(self, work: Work) -> Ticket:
        """Queue a request. See `Engine.submit`. What a row cannot do comes out of the ticket, as Cannot."""
        loop = self._running()
        self._check(work)
        if self._stopping:
            raise Busy("the server is stopping\n  ask another one, or again when it is back", retry_after=5.0)
        if len(loop.open) >= self.rows + self.waiting:
            after = min(max(loop.counters.seconds_each / self.rows, 0.5), 60.0)
            raise Busy(
                f"all {self.rows} rows are taken and {self.waiting} requests wait\n  ask again in {after:.1f} s",
                retry_after=after,
            )
        request = Request(work, _merged(work.choice))
        self.tiers.claim(request.keys)

        def cancel() -> None:
            request.cancelled = True
            loop.wake()

        request.ticket = Ticket(cancel)
        loop.open.add(request)
        if work.sampling.schema is None:
            loop.give(request)
        else:
            task = asyncio.create_task(self._with_grammar(loop, request, work.sampling.schema))
            self._compiling.add(task)
            task.add_done_callback(self._compiling.discard)
        if loop.failed is not None:  # since the check above; its thread may not have seen this request
            request.ticket.put(loop.failed)
        return request.ticket

    async def load(self, key: str, source: Source, *, pin: bool = False) -> None:
        """Make an adapter usable. See `Engine.load`."""
        self._running()
        await self.tiers.load(key, source, pin=pin)

    async def unload(self, key: str) -> int:
        """Forget an adapter once its requests are done. See `Engine.unload`."""
        loop = self._running()
        freed = await self.tiers.unload(key)
        loop.call(partial(self.prefixes.forget, key))
        return freed

    def stats(self) -> Stats:
        """Return counts as of now."""
        tiers, loop = self.tiers.stats(), self._loop
        in_tiers = {
            "on_device": tiers.on_device,
            "in_memory": tiers.in_memory,
            "memory_bytes": tiers.memory_bytes,
            "loads": tiers.loads,
            "evictions": tiers.evictions,
        }
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
        await asyncio.to_thread(loop.close)
        self.tiers.close()
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
            raise loop.failed
        return loop

    def _check(self, work: Work) -> None:
        """Raise for what this engine cannot do, whoever asks."""
        ids, sampling = work.ids, work.sampling
        if not ids:
            raise Cannot("the prompt is empty\n  expected at least one token", "prompt")
        if not 0 <= min(ids) <= max(ids) < self.facts.vocabulary:
            wrong = next(i for i in ids if not 0 <= i < self.facts.vocabulary)
            raise Cannot(
                f"the prompt has the token {wrong}; the base has tokens 0 to {self.facts.vocabulary - 1}", "prompt"
            )
        if sampling.max_tokens < 1:
            raise Cannot(f"max_tokens is {sampling.max_tokens}; expected at least 1", "max_tokens")
        if len(ids) + sampling.max_tokens > self.facts.context:
            raise TooLong(
                f"the prompt has {len(ids)} tokens and max_tokens is {sampling.max_tokens}; the context has "
                f"{self.facts.context}\n  shorten the prompt, or lower max_tokens to "
                f"{max(self.facts.context - len(ids), 0)}"
            )
        if (sampling.logprobs or 0) > MAX_LOGPROBS:
            raise Cannot(f"logprobs is {sampling.logprobs}; expected up to {MAX_LOGPROBS}", "logprobs")
        check_sampling(sampling, self.facts.vocabulary)
        if sampling.schema is not None and self.grammars is None:
            raise Cannot("this engine was started without grammars, so it has no JSON mode", "schema")


def _merged(choice: Choice) -> Choice:
    """Return a choice with each key once, in a fixed order, without those of weight 0: equal ones are the same then."""
    weights: dict[str, float] = {}
    for key, weight in choice:
        weights[key] = weights.get(key, 0.0) + weight
    return tuple(sorted((key, weight) for key, weight in weights.items() if weight))


async def _emptied(loop: Loop, seconds: float) -> None:
    """Wait until no request is open, so many seconds at most."""
    end = asyncio.get_running_loop().time() + seconds
    while loop.open and loop.failed is None and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.01)
