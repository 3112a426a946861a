"""Where adapters are: on the device (attached), in memory (built, not attached) or on disk (their source alone).

    disk    --- read, check, build: in a loader's thread ------------->  memory
    memory  --- attach: the engine's thread, between two steps ------->  device
    device  --- detach, for another that is asked for: the same ------>  memory    least recently used, not in use
    memory  --- drop, above `memory_bytes` --------------------------->  disk      least recently used

The device's places are few and its steps must not wait, so the engine's thread does what cannot be done elsewhere: 2 to
10 ms for each adapter that comes or goes, and what takes longer than `BUDGET` together goes on in the next pass. On a
CPU the device's memory is ours, and nothing is copied; what is built in an accelerator's memory and gets no place there
is moved to ours.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from ...adapter.adapter import Adapter
from ...bases.pipeline import as_module
from ...errors import AdapterError, LorakitError
from ..engine import Source
from ..errors import EngineFailed, UnknownAdapter, without_traceback
from . import heap
from .calls import Calls
from .entry import Entry
from .loading import Arrived, Loader, refusal
from .places import Arrangement, OnDevice, arrange, check_pin, check_places
from .shelves import Shelves

Result = TypeVar("Result")
# Seconds of a pass after which the next adapter waits for the next one. Attaching a 20 MB adapter takes about 2 ms.
BUDGET = 0.004
# Passes after which an adapter that no waiting request has asked for again is not brought any more. Requests ask in
# each pass; one whose claim comes after a pass has taken its new requests asks only in the next but one.
FORGOTTEN = 2


@dataclass(frozen=True)
class TierStats:
    """Counts as of now; `loads` and `evictions` since the start. The fields have the names of `engine.Stats`."""

    on_device: int = 0
    in_memory: int = 0
    memory_bytes: int = 0
    loads: int = 0
    evictions: int = 0


class Tiers:
    """Which adapters are on the device, in memory, on disk. An adapter is attached to the model under its key.

    Event loop's thread: `load`, `unload`, `claim`, `release`, `stats`, `close`. Engine's thread: `between_steps`,
    `ready`, `use`, `done`. The engine, in each pass:

        tiers.between_steps()                       # outside `route`
        for work in waiting: tiers.ready(keys)      # in order of arrival, each pass, also while no slot is free
        tiers.use(keys) ... tiers.done(keys)        # a work gets a slot ... and gives it back

    The engine sets `wake`, called from any thread when there is something for `between_steps` to do, and `has_gone`,
    called in the engine's thread with the key of an adapter that was unloaded.
    """

    wake: Callable[[], None]
    has_gone: Callable[[str], object]

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, device: int = 32, memory_bytes: int = 2 << 30):
        """device: adapters that may be attached at once. memory_bytes: of those in memory and not attached.

        Runs the model once, on a few tokens. No other thread may use it meanwhile.
        """
        if device < 1:
            raise ValueError(f"device={device}: expected a place for at least one adapter")
        self.wake, self.has_gone = lambda: None, lambda key: None
        self._places, module = device, as_module(model)
        self._shelves = Shelves(module, device, memory_bytes)
        self._loader = Loader(module, tokenizer, Calls(module), self._checked, lambda: self.wake())
        self._lock = threading.RLock()
        self._entries: dict[str, Entry] = {}
        self._pinned: dict[str, Entry] = {}
        self._leaving: dict[str, Entry] = {}  # to be unloaded
        self._new: dict[str, Entry] = {}  # in memory for the first time: they get empty places
        self._asked: dict[tuple[str, ...], int] = {}  # the adapters of waiting requests -> the pass in which they asked
        self._given_up: set[str] = set()  # on the device, in use, and to be replaced: they take no more rows
        self._pass = self._uses = 0
        self._pending = False  # whether there is something to do between two steps

    # ------------------------------------------------------------------------------------- the event loop's thread

    async def load(self, key: str, source: Source, *, pin: bool = False) -> None:
        """Read an adapter, check it against the model, and make it known. See `Engine.load`.

        A pinned one is attached when this returns; others are in the next pass, if there is an empty place or a request
        asks for them. Raises AdapterError for what cannot be served, and NoPlace for a pin if all places are pinned;
        then nothing has changed.
        """
        with self._lock:
            entry = self._entries.get(key)
            if pin and key not in self._pinned:
                check_pin(source.label, [other.source.label for other in self._pinned.values()], self._places)
            if entry is None:
                entry = self._entries[key] = Entry(key, source)
                self._begin(entry)
            elif entry.unloaded is not None:  # asked for again before its last request was done
                entry.unloaded.set_result(0)
                entry.unloaded = None
                del self._leaving[key]
            waits: list[Future[None]] = [entry.loaded]
            if not pin:
                self._unpin(entry)
            else:
                self._pinned[key] = entry
                if key not in self._shelves.device:
                    entry.placed = entry.placed or Future()
                    waits.append(entry.placed)
        self._change()
        for future in waits:
            await _done(future)

    async def unload(self, key: str) -> int:
        """Forget an adapter when no request holds it (`claim`, `use`) any more. Return the bytes freed.

        Raises UnknownAdapter.
        """
        with self._lock:
            entry = self._entry(key)
            entry.unloaded = unloaded = entry.unloaded or Future()
            self._leaving[key] = entry
            self._unpin(entry)
        self._change()
        return await _done(unloaded)

    def claim(self, keys: Sequence[str]) -> None:
        """Hold adapters for a request, from `submit` on until `release`, so that `unload` waits for it.

        Raises UnknownAdapter for one that is not loaded or is being unloaded, Cannot for more at once than the device
        has places for.
        """
        with self._lock:
            entries = [self._entry(key) for key in keys]
            leaving = next((entry for entry in entries if entry.unloaded is not None), None)
            if leaving is not None:
                raise UnknownAdapter(f"adapter '{leaving.source.label}' is being unloaded\n  load it again first")
            check_places(keys, self._pinned, self._places)
            for entry in entries:
                entry.claims += 1
            if keys:  # so that they come in the next pass, and the request need not ask first and wait for another
                self._asked.setdefault(tuple(keys), self._pass)
                self._pending = self._pending or any(key not in self._shelves.device for key in keys)

    def release(self, keys: Sequence[str]) -> None:
        """Undo one `claim`. May be called in either thread."""
        with self._lock:
            for key in keys:
                self._entries[key].claims -= 1
        if not self._leaving.keys().isdisjoint(keys):
            self._change()

    def stats(self) -> TierStats:
        """Return counts as of now."""
        with self._lock:
            shelves = self._shelves
            return TierStats(len(shelves.device), len(shelves.built), shelves.bytes, shelves.loads, shelves.evictions)

    def abandon(self, error: LorakitError) -> None:
        """End all waits for adapters with this error: the engine's thread has ended. May be called in either thread."""
        with self._lock:
            for entry in self._entries.values():
                entry.fail(without_traceback(error))

    def close(self) -> None:
        """Detach everything, after the engine's thread has ended. Waits for what is being built, not for what is being
        read: a thread may hang in a file that does not answer.
        """
        self.abandon(EngineFailed("the engine has stopped\n  start the server again", heals=False))
        self._loader.close()
        self._shelves.close()

    # ------------------------------------------------------------------------------------------- the engine's thread

    def between_steps(self) -> None:
        """Attach what was read, evict for it, detach what is to be unloaded: after `BUDGET` no more than one of each.
        Outside `route`.
        """
        with self._lock:
            self._pass += 1
            self._asked = {keys: at for keys, at in self._asked.items() if at >= self._pass - FORGOTTEN}
            if not (self._pending or self._loader.has_arrived):
                return
        with self._loader.turn() as free:
            if free:  # else something is being prepared, and will wake us
                with self._lock:
                    self._do_pending()

    def ready(self, keys: Sequence[str]) -> bool:
        """Whether all these adapters are attached; else begin to bring them.

        Raises AdapterError if one of them cannot be read any more, UnknownAdapter if it is not loaded. Asked in order
        of arrival: places go to those who asked first, and one that waits for a place gets it before later ones.
        """
        if not keys:
            return True
        with self._lock:
            for key in keys:
                entry = self._entry(key)
                if entry.problem is not None and entry.problem_at >= self._pass - 1:
                    raise without_traceback(entry.problem)  # several requests may raise it
            check_places(keys, self._pinned, self._places)
            self._asked[tuple(keys)] = self._pass
            here = all(key in self._shelves.device and key not in self._given_up for key in keys)
            self._pending = self._pending or not here
            return here

    def use(self, keys: Sequence[str]) -> None:
        """Keep these adapters, which are ready, on the device until `done`. Counted: one `done` for each `use`."""
        with self._lock:
            self._asked.pop(tuple(keys), None)
            for key in keys:
                self._entries[key].users += 1
                self._touch(self._entries[key])

    def done(self, keys: Sequence[str]) -> None:
        """Undo one `use`."""
        with self._lock:
            for key in keys:
                self._entries[key].users -= 1
        if not (self._leaving.keys() | self._given_up).isdisjoint(keys):
            self._change()

    # What happens between two steps. The lock is held, and nothing is being prepared.

    def _do_pending(self) -> None:
        shelves = self._shelves
        for key, result in self._loader.take():
            self._arrive(self._entries[key], result)
        until = time.perf_counter() + BUDGET
        late = self._unload(until)
        held = {key: OnDevice(e.users, e.used, key in self._pinned) for key, e in shelves.device.items()}
        requests = [*([key] for key in self._pinned), *self._asked]
        found = arrange([[key for key in keys if key in self._entries] for keys in requests], held, self._places)
        self._given_up = set(found.after.values())
        # What is loaded and not asked for yet comes last, and gets empty places only.
        empty = self._places - len(held) - sum(victim is None for victim in found.bring.values())
        unasked = [key for key in self._new if key not in found.bring and key not in found.after]
        found.bring |= dict.fromkeys(unasked[: max(empty, 0)])
        late |= self._bring_all(found, until)
        for key in [key for key in self._new if key not in late]:
            _set(self._new.pop(key).loaded)
        soon = found.bring.keys() | found.after.keys()
        shelves.drop_oldest(soon, self._loader)
        shelves.park(soon, self._loader)
        self._loader.swapping = shelves.swaps
        self._pending = bool(found.bring or found.after or self._leaving)
        if late:
            self.wake()

    def _bring_all(self, found: Arrangement, until: float) -> set[str]:
        """Attach what is at hand, and begin to read the rest. Return what there was no time for in this pass."""
        late, attached = set(), False
        for key in (*found.bring, *found.after):
            entry = self._entries[key]
            if not entry.moving and entry.prepared is not None and entry.prepared.outdated:
                self._shelves.drop(entry)
            if not self._shelves.at_hand(entry):
                self._begin(entry)
            elif key in found.after:
                continue
            elif attached and time.perf_counter() > until:
                late.add(key)
            else:
                self._bring(entry, found.bring[key])
                attached = True
        return late

    def _arrive(self, entry: Entry, result: Arrived) -> None:
        """Take what the loader made of an adapter."""
        entry.moving = False
        if isinstance(result, Adapter):
            result = self._loader.prepare(entry.key, result, entry.source.label)
        if isinstance(result, AdapterError):
            self._fail(entry, result)
            return
        entry.prepared, entry.size, entry.problem = result, result.bytes, None
        if entry.key not in self._shelves.built:  # else it was moved from or to the device's memory
            self._touch(entry)
        self._shelves.put(entry)
        if entry.is_new:
            entry.is_new, self._new[entry.key] = False, entry

    def _fail(self, entry: Entry, problem: AdapterError) -> None:
        """Note that an adapter cannot be had. One that was never loaded is forgotten."""
        self._shelves.drop(entry)
        entry.prepared, entry.problem, entry.problem_at = None, without_traceback(problem), self._pass
        for future in (entry.loaded, entry.placed):
            if future is not None and not future.done():
                future.set_exception(problem)
        entry.placed = None
        self._unpin(entry)
        self._new.pop(entry.key, None)
        if entry.loaded.exception() is not None:
            del self._entries[entry.key]

    def _unload(self, until: float) -> set[str]:
        """Forget what leaves and is free. Return what there was no time for in this pass."""
        late: set[str] = set()
        gone: list[tuple[Future[int], int]] = []
        for key, entry in list(self._leaving.items()):
            if not entry.is_free:
                continue
            if key in self._shelves.device:
                if gone and time.perf_counter() > until:
                    late.add(key)
                    continue
                self._shelves.detach(entry)
            freed = self._shelves.drop(entry)
            entry.prepared = None
            self._new.pop(key, None)
            del self._leaving[key], self._entries[key]
            self.has_gone(key)
            assert entry.unloaded is not None
            gone.append((entry.unloaded, freed))
        if gone:
            self._loader.run(heap.trim)
        for unloaded, freed in gone:
            unloaded.set_result(freed)
        return late

    def _bring(self, entry: Entry, victim: str | None) -> None:
        """Attach an adapter that is at hand, in place of another."""
        if victim is not None:
            self._shelves.detach(self._entries[victim])
            self._shelves.evictions += 1
        try:
            self._shelves.attach(entry)
        except Exception as error:
            self._fail(entry, refusal(entry.source.label, error))
            return
        self._touch(entry)
        entry.end_wait_for_place()

    def _begin(self, entry: Entry) -> None:
        """Begin to make an adapter ready to be attached, unless that was begun."""
        if not entry.moving:
            entry.moving = True
            if entry.prepared is None:
                self._loader.read(entry.key, entry.source)
            else:
                self._loader.fetch(entry.key, entry.prepared, entry.source.label)

    # Other threads

    def _checked(self, key: str) -> None:
        """Note, in a loader's thread, that an adapter passed all checks: it is loaded, and about to arrive."""
        with self._lock:
            _set(self._entries[key].loaded)

    def _change(self) -> None:
        """Have `between_steps` look for what there is to do."""
        self._pending = True
        self.wake()

    def _touch(self, entry: Entry) -> None:
        self._uses += 1
        entry.used = self._uses

    def _entry(self, key: str) -> Entry:
        entry = self._entries.get(key)
        if entry is None or not entry.loaded.done():
            raise UnknownAdapter(f"no adapter is loaded under the key {key[:12]}\n  load it first")
        return entry

    def _unpin(self, entry: Entry) -> None:
        self._pinned.pop(entry.key, None)
        entry.end_wait_for_place()


def _set(future: Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _done(future: Future[Result]) -> Result:
    """Wait for another thread. Whoever waits may be cancelled without ending the wait of others."""
    return await asyncio.shield(asyncio.wrap_future(future))
