"""The engine's seam on vLLM: token ids go to its /v1/completions, token ids come back.

    engine = VllmEngine(VllmSettings("Qwen/Qwen3-8B", ("venv/bin/vllm",), max_rank=32))
    facts = await engine.start()            # minutes, for a large model

What differs from the embedded engine, because vLLM does it so:

- A mix or a scale becomes a file when it is first asked for, with the sum of the ranks, which `max_rank` bounds.
- No adapter can be pinned.
- Unloading lets vLLM forget the name. Some versions keep the weights until another adapter takes their place.
- A seed gives the same answer only as far as vLLM's kernels do not depend on what else is in the batch.
- Which adapters are on the device, and how many requests wait, is not known: see `stats`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque

from ...errors import LorakitError
from ..engine import Ability, Facts, Piece, Source, Stats, Work
from ..errors import Busy, Cannot, EngineFailed, Stopping, TooLong
from ..ticket import Ticket
from .adapters import Adapters
from .argv import MAX_LOGPROBS, VllmSettings, rank_flag
from .base import BaseShell
from .cache import ExportCache
from .child import READY_SECONDS, Child
from .http import VllmClient

ROWS = 256  # requests that vLLM computes at once by default
CAN: frozenset[Ability] = frozenset({"mix", "scale", "schema", "logprobs", "logit_bias", "min_p", "repetition"})


class VllmEngine:
    """Serves a base and its adapters by a vLLM child process."""

    def __init__(
        self,
        settings: VllmSettings,
        *,
        shell: BaseShell | None = None,
        cache: ExportCache | None = None,
        waiting: int = 256,
        ready_seconds: float = READY_SECONDS,
    ):
        """shell: of the base; None: `start` builds it. cache: of exported adapters. waiting: requests beyond those
        computed at once, before they are refused. ready_seconds: how long vLLM may take to start.
        """
        self.settings = settings
        self._cache = ExportCache() if cache is None else cache
        self._most = (settings.rows or ROWS) + waiting
        self._ready_seconds = ready_seconds
        self._shell = shell
        self._child = Child(settings, self._load_again)
        self._adapters: Adapters | None = None
        self._ends: frozenset[int] = frozenset()
        self._facts: Facts | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._counts = {"prompt": 0, "cached": 0, "answer": 0, "started": 0}
        self._last: float | None = None
        self._durations: deque[float] = deque(maxlen=64)  # seconds of the latest answers

    async def start(self) -> Facts:
        """Start vLLM, and meanwhile build the base's shell. Raises LorakitError with the end of vLLM's log."""
        settings = self.settings
        starting = asyncio.create_task(self._child.start(self._ready_seconds))
        try:
            shell = self._shell
            if shell is None:
                shell = await asyncio.to_thread(BaseShell, settings.base, settings.revision)
            await starting
            context = await self._child.client.context()
        except BaseException:
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError, LorakitError):
                await starting
            await self._child.stop()
            raise
        self._ends = shell.ends
        self._adapters = Adapters(shell, self._cache, rank_flag([], settings.max_rank))
        self._facts = Facts(settings.base, context, shell.vocabulary, CAN, MAX_LOGPROBS)
        return self._facts

    def submit(self, work: Work) -> Ticket:
        """Queue a request. What only vLLM can refuse (a schema, a temperature) is raised by the ticket, as Cannot."""
        self._check(work)
        task: asyncio.Task[None]

        def cancel() -> None:
            task.cancel()

        ticket = Ticket(cancel)
        task = asyncio.create_task(self._run(work, ticket))
        self._tasks.add(task)

        def done(ended: asyncio.Task[None]) -> None:
            self._tasks.discard(ended)
            if ended.cancelled():  # before it ran at all
                ticket.put(Piece((), finish="cancelled"))

        task.add_done_callback(done)
        return ticket

    async def load(self, key: str, source: Source, *, pin: bool = False) -> None:
        """Export an adapter for vLLM, verified, and let it read the file."""
        if pin:
            raise Cannot(
                "vLLM's server has no call that pins an adapter\n  load it without a pin, and keep it in memory by "
                f"--adapter-memory: vLLM holds {self.settings.in_memory} adapters",
                "pin",
            )
        await self._ready().load(key, source, self._child.client)

    async def unload(self, key: str) -> int:
        """Forget an adapter once its requests are done. Return the bytes of its file, which vLLM need not hold."""
        return await self._ready().unload(key, self._child.client if self._child.alive else None)

    def stats(self) -> Stats:
        """Return counts. running: requests with a first token; waiting: those without. on_device: not known, 0."""
        loaded, counts = self._adapters, self._counts
        return Stats(
            running=counts["started"],
            waiting=len(self._tasks) - counts["started"],
            prompt_tokens=counts["prompt"],
            cached_tokens=counts["cached"],
            answer_tokens=counts["answer"],
            in_memory=0 if loaded is None else len(loaded),
            memory_bytes=0 if loaded is None else loaded.size,
            loads=0 if loaded is None else loaded.loads,
            last_step=self._last,
            alive=self._child.alive,
        )

    async def stop(self, drain: float) -> None:
        """Refuse new work, wait `drain` seconds for requests, cancel the rest, and end vLLM."""
        self._stopping = True
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=drain)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks))
        await self._child.stop()
        if self._adapters is not None:
            self._adapters.close()

    def _check(self, work: Work) -> None:
        """Raise what can be told before vLLM is asked."""
        adapters, facts = self._ready(), self._facts
        assert facts is not None
        if self._stopping:
            raise Stopping("the server is stopping", retry_after=10.0)
        if not self._child.alive:
            _ = self._child.client  # raises, with the reason
        adapters.check(work.choice)
        sampling = work.sampling
        if not work.ids:
            raise Cannot("the prompt is empty; expected at least one token", "prompt")
        if len(work.ids) + sampling.max_tokens > facts.context:
            raise TooLong(
                f"the prompt has {len(work.ids)} tokens and the answer may have {sampling.max_tokens}; the context "
                f"has {facts.context}\n  lower max_tokens, or shorten the prompt"
            )
        if sampling.logprobs is not None and sampling.logprobs > facts.max_logprobs:
            raise Cannot(f"logprobs is {sampling.logprobs}; expected at most {facts.max_logprobs}", "logprobs")
        if len(self._tasks) >= self._most:
            raise Busy(f"all {self._most} places are taken", self._retry_after())

    async def _run(self, work: Work, ticket: Ticket) -> None:
        """Answer one request. Cancelling the task closes the connection, and vLLM frees its slot."""
        began, started = time.monotonic(), False
        left = None if work.deadline is None else max(work.deadline - began, 0.0)
        try:
            async with asyncio.timeout(left):
                if work.sampling.max_tokens < 1:
                    ticket.put(Piece((), finish="length"))
                    return
                async with (
                    self._ready().used(work.choice, self._child.client) as name,
                    contextlib.aclosing(self._child.client.complete(name, work, self._ends)) as pieces,
                ):
                    async for piece in pieces:
                        if not started:
                            started = True
                            self._counts["started"] += 1
                            self._counts["prompt"] += len(work.ids)
                        self._counts["answer"] += len(piece.ids)
                        self._counts["cached"] += piece.cached
                        self._last = time.monotonic()
                        ticket.put(piece)
            self._durations.append(time.monotonic() - began)
        except TimeoutError:
            ticket.put(Piece((), finish="timeout"))
        except asyncio.CancelledError:
            ticket.put(Piece((), finish="cancelled"))
        except LorakitError as error:
            ticket.put(error)
        except Exception as error:  # ours: the reader must not wait for ever
            ticket.put(EngineFailed(f"{type(error).__name__}: {error}"))
            raise
        finally:
            self._counts["started"] -= started

    def _ready(self) -> Adapters:
        if self._adapters is None:
            raise EngineFailed("the engine has not been started")
        return self._adapters

    async def _load_again(self, client: VllmClient) -> None:
        if self._adapters is not None:
            await self._adapters.load_again(client)

    def _retry_after(self) -> float:
        """Estimate the seconds until the next place is free: an answer's mean time over the answers at once."""
        if not self._durations:
            return 1.0
        mean = sum(self._durations) / len(self._durations)
        return min(max(mean / self._most, 0.5), 60.0)
