"""The thread that owns the model: what happens in each pass, from new works to the pieces that go out.

    take  ->  tiers.between_steps  ->  drop  ->  admit  ->  prefill a chunk  ->  one step of each batch  ->  deliver

Everything here runs in that thread, but for what `Inbox` and the counters say.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from ...errors import LorakitError
from ..engine import Choice, Finish, Piece
from ..errors import EngineFailed, without_traceback
from ..ticket import Ticket, deliver
from . import prefill
from .batches import Batches
from .picking import Picked, Picking, pick
from .prefill import Group, Pace, Start, grouped
from .prefixes import KeysValues
from .request import Request
from .runner import Flattened
from .slots import Slots

if TYPE_CHECKING:
    from .prefixes import Prefixes
    from .runner import Runner
    from .tiers import Tiers

log = logging.getLogger(__name__)

# Seconds of prompts in a pass while answers wait for their next token, and while none does. It bounds how long a
# cancelled request keeps its row.
SECONDS, SECONDS_ALONE = 0.1, 0.5
# Seconds to sleep at most while requests wait for an adapter, a grammar or a deadline; `wake` ends it.
NAP = 0.05


class Counters:
    """What the loop counts. Written by its thread alone, read by any."""

    def __init__(self) -> None:
        self.prompt_tokens = self.cached_tokens = self.answer_tokens = 0
        self.last_step: float | None = None
        self.seconds_each = 1.0  # that a request holds a row: a running mean, for Busy's retry_after


class Loop:
    """Serves requests until `close`. The event loop's thread calls `give`, `call`, `wake`, `cancel_all`, `close`."""

    def __init__(self, runner: Runner, tiers: Tiers, prefixes: Prefixes, *, rows: int, to: asyncio.AbstractEventLoop):
        self.runner, self.tiers, self.prefixes, self.max_rows = runner, tiers, prefixes, rows
        self.counters = Counters()
        self.failed: EngineFailed | None = None  # why the thread has ended; it ends by itself only so
        self.open: set[Request] = set()  # all requests that are not done; changed by both threads, one call each
        self.waiting: deque[Request] = deque()
        self._groups: deque[Group] = deque()
        self._pace = Pace()
        self._batches = Batches(runner, rows)
        self._out: list[tuple[Ticket, Piece | Exception]] = []
        self._to = to
        self._inbox: deque[Request | Callable[[], object]] = deque()
        self._woken = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="lorakit-engine", daemon=True)

    # ---------------------------------------------------------------------------- called by the event loop's thread

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def give(self, request: Request) -> None:
        """Queue a request, which is in `open`."""
        self._inbox.append(request)
        self.wake()

    def refuse(self, request: Request, error: Exception) -> None:
        """End a request of `open` that was not queued."""
        self.call(lambda: self._finish(request, error) if request in self.open else None)

    def call(self, function: Callable[[], object]) -> None:
        """Run a function in the thread that owns the model, between two steps."""
        self._inbox.append(function)
        self.wake()

    def wake(self) -> None:
        """Begin the next pass now. May be called in any thread."""
        self._woken.set()

    def cancel_all(self) -> None:
        """Cancel all requests."""
        for request in list(self.open):
            request.cancelled = True
        self.wake()

    def close(self) -> None:
        """End the thread, and wait for it."""
        self._closing = True
        self.wake()
        self._thread.join()

    # --------------------------------------------------------------------------------------- the thread of the model

    def _run(self) -> None:
        try:
            while not self._closing:
                self._woken.clear()
                self._pass()
                if not (self._groups or len(self._batches) or self._inbox):
                    self._woken.wait(NAP if self.open else None)
        except BaseException as error:
            log.exception("the engine's thread has ended")
            self.failed = EngineFailed(
                f"the engine has stopped: {type(error).__name__}: {error}\n  start the server again", heals=False
            )
            every = list(self.open)
            self.open.difference_update(every)
            self._out.extend((request.ticket, without_traceback(self.failed)) for request in every)
            self._deliver()
            self.tiers.abandon(self.failed)

    def _pass(self) -> None:
        self._take()
        self.tiers.between_steps()
        # In inference mode is all that touches the slots, and nothing of the tiers, whose adapters must be ordinary
        # tensors: `route` sees by their versions whether they have changed.
        with torch.inference_mode():
            self._drop()
        admitted = self._admitted()
        with torch.inference_mode():
            self._begin(admitted)
            self._prefill()
            self._arrange()
            for slots in self._batches:
                self._step(slots)
        self._deliver()

    def _take(self) -> None:
        while self._inbox:
            taken = self._inbox.popleft()
            if not isinstance(taken, Request):
                taken()
            elif taken in self.open:  # else it was cancelled before it got here
                self.waiting.append(taken)

    def _drop(self) -> None:
        """End requests that were cancelled or are past their deadline."""
        now = time.monotonic()
        over = [request for request in list(self.open) if _ended(request, now) is not None]
        if not over:
            return
        ended = set(over)
        self.waiting = deque(request for request in self.waiting if request not in ended)
        for slots in self._batches:
            for at in range(len(slots.rows) - 1, -1, -1):
                if slots.rows[at] in ended:
                    slots.remove(at)
        for group in self._groups:
            group.drop(ended)
        self._groups = deque(group for group in self._groups if group.starts)
        for request in over:
            self._finish(request, Piece((), finish=_ended(request, now)))

    # ------------------------------------------------------------------------------------------------- prompts

    def _admitted(self) -> list[Request]:
        """Return the waiting requests that get a free row: those whose adapters are ready, in order of arrival."""
        free = self.max_rows - len(self._batches) - sum(len(group.requests) for group in self._groups)
        admitted: list[Request] = []
        still: list[Request] = []
        for request in self.waiting:
            try:
                if not self.tiers.ready(request.keys) or len(admitted) >= free:
                    still.append(request)
                    continue
                self.runner.check(request.choice)
                request.picking = Picking(request.work.sampling, request.work.ids, request.matcher, self.runner.device)
            except LorakitError as error:
                self._finish(request, error)
                continue
            except Exception as error:  # a mistake of ours must not end the others' requests
                self._broke([request], error)
                continue
            self.tiers.use(request.keys)
            now = time.monotonic()
            if not (admitted or self._groups or len(self._batches)):
                self.counters.last_step = now  # it was idle: the time since its last step says nothing
            request.admitted = now
            admitted.append(request)
        self.waiting = deque(still)
        return admitted

    def _begin(self, admitted: Sequence[Request]) -> None:
        """Queue the prompts of requests that got a row, as far as they are not known."""
        missing: dict[tuple[Choice, tuple[int, ...]], Start] = {}
        for request in admitted:
            try:
                start = self._start(request)
            except Exception as error:
                self._broke([request], error)
                continue
            same = request.choice, tuple(request.ids)
            if not start.missing:
                self._add(request, start.keys_values)
            elif same in missing:
                missing[same].also.append(request)
                self._count_cached(request, request.fed)
            else:
                missing[same] = start
        try:
            self._groups.extend(grouped(self.runner, list(missing.values())))
        except Exception as error:
            self._broke([r for start in missing.values() for r in (start.request, *start.also)], error)

    def _start(self, request: Request) -> Start:
        """Look up what is kept of a prompt."""
        found = self.prefixes.find(request.choice, request.work.ids) if request.fed else None
        self.counters.prompt_tokens += request.prompt
        if found is None:
            return Start(request)
        self._count_cached(request, found.length)
        return Start(request, found.length, found.keys_values)

    def _count_cached(self, request: Request, tokens: int) -> None:
        self.counters.cached_tokens += tokens - request.cached
        request.cached = tokens

    def _prefill(self) -> None:
        left = self._pace.tokens(SECONDS if len(self._batches) else SECONDS_ALONE)
        while self._groups and left >= prefill.LEAST:
            group = self._groups.popleft()
            began = time.perf_counter()
            try:
                fed = group.advance(self.runner, left)
                self._pace.saw(fed, time.perf_counter() - began)
                self.counters.last_step = time.monotonic()
                left -= fed
            except Flattened:
                self._groups.extend(group.again(self.runner))
                continue
            except Exception as error:
                self._broke(group.requests, error)
                continue
            if not group.done:
                self._groups.append(group)  # behind the others, so that a long prompt does not hold up short ones
                continue
            for request, keys_values in group.rows():
                self._add(request, keys_values)
                self._keep(request, request.work.ids[:-1], keys_values)

    def _add(self, request: Request, keys_values: KeysValues | None) -> None:
        """Give a request whose prompt is computed a slot."""
        try:
            self._batches.add(request, keys_values)
        except Exception as error:
            self._broke([request], error)

    def _keep(self, request: Request, ids: Sequence[int], keys_values: KeysValues) -> None:
        try:
            self.prefixes.keep(request.choice, ids, keys_values)
        except (RuntimeError, MemoryError) as error:  # no memory for a copy; the answer does not need it
            log.warning("the start of a prompt was not kept: %s", error)

    # ------------------------------------------------------------------------------------------------- answers

    def _arrange(self) -> None:
        try:
            self._batches.arrange()
        except Exception as error:
            self._broke(self._batches.clear(), error)

    def _step(self, slots: Slots) -> None:
        """Compute the next token of each row, and send it."""
        try:
            logits = self.runner.step(slots)
            picked = pick(logits, [request.picking for request in slots.rows])
        except Exception as error:
            broken = list(slots.rows)
            slots.reset()
            self._broke(broken, error)
            return
        self.counters.last_step = time.monotonic()
        for request, new in zip(list(slots.rows), picked, strict=True):
            self._took(slots, request, new)

    def _took(self, slots: Slots, request: Request, picked: Picked) -> None:
        """Add what was picked for a row to its answer."""
        if picked.error is not None:
            at = slots.rows.index(request)
            slots.clear_row(at)  # the values may be NaN, see `slots`
            slots.remove(at)
            self._finish(request, picked.error)
            return
        fed = len(request.ids)
        new = () if picked.id is None else (picked.id,)
        request.ids.extend(new)
        logprobs = () if picked.logprob is None else (picked.logprob,)
        piece = Piece(new, logprobs, picked.finish, request.cached if fed == request.prompt else 0)
        self.counters.answer_tokens += len(new)
        if picked.finish is None:
            self._out.append((request.ticket, piece))
            return
        at = slots.rows.index(request)
        self._keep(request, request.ids[:fed], slots.read(at, fed))
        slots.remove(at)
        self._finish(request, piece)

    # ------------------------------------------------------------------------------------------------- ends

    def _finish(self, request: Request, last: Piece | Exception) -> None:
        """Send a request's last piece or its error, and let go of its adapters. It must have left its row."""
        self.open.discard(request)
        if request.admitted:
            self.tiers.done(request.keys)
            seconds = time.monotonic() - request.admitted
            self.counters.seconds_each += 0.1 * (seconds - self.counters.seconds_each)
        self.tiers.release(request.keys)
        if request.compiling is not None and not (request.compiling.done() or self._to.is_closed()):
            self._to.call_soon_threadsafe(request.compiling.cancel)  # else it is compiled for nobody
        self._out.append((request.ticket, last))

    def _broke(self, requests: Iterable[Request], error: Exception) -> None:
        """End requests whose computation raised an error. Their slots are dropped; the others go on."""
        log.error("a step failed", exc_info=error)
        # The text is that of torch's RuntimeError where a CPU's memory is short.
        memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error)
        what = "the device is out of memory" if memory else f"{type(error).__name__}: {error}"
        hint = "\n  ask for less: shorter prompts, or start the server with fewer --rows" if memory else ""
        for request in requests:
            self._finish(request, EngineFailed(f"the engine failed while it computed: {what}{hint}"))
        if memory:
            error.__traceback__ = None  # it holds the tensors of the failed step
            gc.collect()
            if self.runner.device.type == "cuda":
                torch.cuda.empty_cache()

    def _deliver(self) -> None:
        out, self._out = self._out, []
        deliver(self._to, out)


def _ended(request: Request, now: float) -> Finish | None:
    if request.cancelled:
        return "cancelled"
    deadline = request.work.deadline
    return "timeout" if deadline is not None and now >= deadline else None
