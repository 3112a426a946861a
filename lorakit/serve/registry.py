"""The server's adapters by public name: where they lie, which content each stands for, and who uses it now.

    registry = Registry(engine, facts, base_names=["qwen"], roots=Roots([folder]), hub=Hub(), state=path)
    registry.add("sql", "runs/sql/adapter")               # the command line's, before the start
    await registry.start()                                # the state file's, those below the roots
    async with registry.lease("sql:0.7+chat:0.3", None) as leased: ...      # held until the request is done

A name is `registered` until its first use, which reads its files, hashes them and loads them into the engine under the
hash. A file that changes afterwards changes nothing until the name is loaded again in place; then new requests get the
new content, and those that run keep the old one until they are done.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ..data.chat_record import ChatRecord
from ..errors import LorakitError, StateError
from . import names
from .card import Card, Leased
from .engine import Engine, Facts, choice_of
from .errors import Cannot, UnknownAdapter
from .guard.hub import Hub
from .guard.roots import Roots
from .locations import Locate, Locations
from .readers import Readers
from .registered import Registered
from .root_scan import FoundAdapter, RootScan
from .sources import AdapterFiles, Stamp, remove_abandoned
from .state_file import Loaded, StateFile
from .versions import Version, Versions

log = logging.getLogger(__name__)
T = TypeVar("T")


class Registry:
    """See above. All methods are called in the event loop's thread, `add` before `start`."""

    def __init__(
        self,
        engine: Engine,
        facts: Facts,
        *,
        base_names: Sequence[str],
        roots: Roots | None = None,
        hub: Hub | None = None,
        state: Path | None = None,
        max_registered: int = 10_000,
        allow_pickle: bool = False,
        base: Any = None,
        check: Callable[[Mapping[str, Any]], Awaitable[None]] | None = None,
    ):
        """allow_pickle: for `add` only. base, check: see `Readers`; check is `Renderer.check`."""
        self.facts = facts
        self.base_names = tuple(base_names)
        self.locations = Locations(roots or Roots(), hub or Hub(), allow_pickle)
        self.max_registered = max_registered
        self.base = base
        self.versions = Versions(engine)
        self._entries: dict[str, Registered] = {}
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._state = StateFile(state, facts.base) if state is not None else None
        self._writing = asyncio.Lock()
        self._readers = Readers(base, check)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._scan = RootScan(self.locations, self.base_names, self._register)

    def add(self, name: str, path: str | Path, *, pin: bool = False) -> Card:
        """Register an adapter of the command line: any path on this machine, or a hub id.

        Raises ConfigError for a name that cannot be one, StateError for one that is taken, AdapterError if there is
        nothing at the path. Whether an adapter is there is seen by `start`.
        """
        names.check_name(name, self.base_names)
        if name in self._entries:
            raise StateError(f"two adapters are called '{name}'\n  give each a name of its own: --adapter NAME=PATH")
        place, locate = self.locations.on_command_line(str(path), name)
        card = Card(name, place, int(time.time()), pinned=pin)
        self._entries[name] = Registered(card, "command line", locate, str(path))
        return card

    async def start(self) -> None:
        """Restore what the state file lists, register what lies below the roots, and load the command line's.

        Raises ConfigError or WriteError for the state file, and the error of the first adapter of the command line that
        cannot be served: who starts a server is there to mend it. The state file's are loaded at their first use.
        """
        await asyncio.to_thread(remove_abandoned)
        try:
            if self._state is not None:
                for loaded in await asyncio.to_thread(self._state.open):
                    self._restore(loaded)
            await self.rescan()
            for name, entry in list(self._entries.items()):
                if entry.origin == "command line":
                    await self._first_use(name, entry)
        except BaseException:
            if self._state is not None:
                self._state.close()
            raise

    def _restore(self, loaded: Loaded) -> None:
        if loaded.name in self._entries or loaded.name in self.base_names:
            log.warning("the state file's adapter '%s' is left out: the command line gives that name", loaded.name)
            return
        card = Card(loaded.name, loaded.place, loaded.created, pinned=loaded.pinned)
        locate = self._over_http(loaded.place, loaded.name)
        self._entries[loaded.name] = Registered(card, "http", locate, loaded.place)

    async def rescan(self) -> int:
        """Register the adapters below the roots that are new, forget those not in use that are gone; return how many
        are new. Names that others have are left to them.
        """
        return await self._scan.now()

    def _register(self, found: Sequence[FoundAdapter]) -> int:
        there = {name for name, _, _ in found}
        for name, entry in list(self._entries.items()):
            if entry.origin == "root" and name not in there and entry.version is None and entry.loading is None:
                del self._entries[name]
        new = [one for one in found if one[0] not in self._entries]
        room = max(self.max_registered - len(self._entries), 0)
        if (over := len(new) - room) > 0:
            log.warning("%d adapters below roots are not registered: the limit is %d", over, self.max_registered)
        for name, place, written in new[:room]:
            locate = self._over_http(place, name)
            self._entries[name] = Registered(Card(name, place, written), "root", locate, place)
        return min(len(new), room)

    async def close(self) -> None:
        """Wait for loads and unloads that are under way, and unlock the state file. The engine stays as it is."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.versions.close()
        self._readers.close()
        if self._state is not None:
            self._state.close()

    def cards(self) -> list[Card]:
        """Return a card for each name, by name: a restarted server lists them in the same order."""
        return [self._card(entry) for _, entry in sorted(self._entries.items())]

    def get(self, name: str) -> Card:
        """Return a name's card. Raises UnknownAdapter."""
        return self._card(self._entry(name))

    def _card(self, entry: Registered) -> Card:
        return replace(entry.card, running=entry.running)

    @asynccontextmanager
    async def lease(self, model: str, scale: float | None = None) -> AsyncIterator[Leased]:
        """Hold the adapters that a request's `model` names (`names.parse`), all weights multiplied by `scale`.

        The first use of a name loads it; others wait for the same load. Raises UnknownAdapter for a name that nothing
        has, ConfigError for an invalid weight or scale, Cannot for a mix or scale that the engine does not offer,
        AdapterError for an adapter that cannot be read or served, and what `Engine.load` raises.
        """
        parts = names.scaled(await self._parts(model), scale)
        self._check_ability(parts)
        held: list[tuple[Registered, Version]] = []
        try:
            cards = []
            for name, weight in parts:
                entry, version = await self._hold(name)
                held.append((entry, version))
                cards.append((abs(weight), self._card(entry)))
            choice = choice_of([(version.key, weight) for (_, version), (_, weight) in zip(held, parts, strict=True)])
            by_weight = sorted(cards, key=lambda one: -one[0])  # stable: as written where weights are equal
            yield Leased(model, choice, tuple(card for _, card in by_weight))
        except LorakitError as error:
            names.name_keys(error, {version.key: entry.card.name for entry, version in held})
            raise
        finally:
            for entry, version in held:
                entry.running -= 1
                self.versions.release(version)

    async def _parts(self, model: str) -> names.Parts:
        try:
            return names.parse(model, self._entries, self.base_names)
        except UnknownAdapter:
            if not self._scan.is_near():
                raise
        await self._scan.next()  # for a folder that was put there meanwhile
        return names.parse(model, self._entries, self.base_names)

    def _check_ability(self, parts: names.Parts) -> None:
        if len(parts) > 1 and "mix" not in self.facts.can:
            raise Cannot("this engine answers with one adapter at a time\n  name one adapter as the model", "mix")
        if any(weight != 1 for _, weight in parts) and "scale" not in self.facts.can:
            raise Cannot("this engine uses adapters at their own scale only\n  leave out scale and weights", "scale")

    async def _hold(self, name: str) -> tuple[Registered, Version]:
        """Return a name's version, loaded, counted as in use."""
        while True:
            entry = self._entry(name)  # again: it may be unloaded meanwhile
            if entry.version is not None:
                self.versions.use(entry.version)
                entry.running += 1
                return entry, entry.version
            await self._first_use(name, entry)

    async def _first_use(self, name: str, entry: Registered) -> None:
        """Load a registered name, once for all who ask. A client that hangs up does not end it."""
        if entry.loading is None:
            entry.loading = self._task(self._load_registered(name, entry))
        await asyncio.shield(entry.loading)

    async def _load_registered(self, name: str, entry: Registered) -> None:
        stamp: Stamp = ()
        try:
            async with self._lock(name):
                if entry.version is not None or self._entries.get(name) is not entry:
                    return
                entry.fail_again(())
                files, stamp = await self._readers.locate(entry.locate)
                entry.fail_again(stamp)
                read = await self._readers.read(files)
                version = await self.versions.bring(read, files, self.base, entry.card.pinned)
                card = entry.card.ready(read)
                if entry.origin == "command line":  # a restarted server says the same
                    card.created = files.modified
                self._activate(entry, version, files, card)
        except LorakitError as error:
            entry.remember(error, stamp)
            raise
        finally:
            entry.loading = None

    async def load(self, name: str, place: str, *, pin: bool | None = False, in_place: bool = False) -> Card:
        """Load an adapter over HTTP. place: relative to a root, or an allowed hub id. Returns its card.

        pin: whether it stays on the device; None: as it was. in_place: replace a name's content; requests that run keep
        what they have. A load that fails changes nothing.
        Raises ConfigError for a name that cannot be one and for places that are not allowed, StateError for a name that
        is loaded already (without in_place) or is not a client's to change, AdapterError for what is not there or
        cannot be served, WriteError if the state file cannot be written, and what `Engine.load` raises.
        """
        names.check_name(name, self.base_names)
        return await asyncio.shield(self._task(self._load(name, place, pin, in_place)))

    async def _load(self, name: str, place: str, pin: bool | None, in_place: bool) -> Card:
        async with self._lock(name):
            entry = self._entries.get(name)
            self._check_load(name, entry, place, in_place)
            if pin is None:
                pin = entry is not None and entry.card.pinned
            configured = entry is not None and entry.origin == "command line"
            locate = self._over_http(place, name)
            if entry is not None and configured:
                place, locate = entry.card.place, entry.locate
            files, _ = await self._readers.locate(locate)
            read = await self._readers.read(files)
            version = await self.versions.bring(read, files, self.base, pin)
            created = int(time.time()) if entry is None or entry.version is not version else entry.card.created
            card = Card(name, place, created, pinned=pin).ready(read)
            try:
                if not configured:
                    await self._save(name, Loaded(name, place, pin, created))
            except BaseException:
                self.versions.drop_name(version, files, pin)
                raise
            # Nothing is awaited from here on, so that no other load writes the state file without this one.
            entry = self._entries.setdefault(name, Registered(card, "http", locate, place))
            if not configured:
                entry.origin, entry.locate, entry.asked = "http", locate, place
            self._activate(entry, version, files, card)
            return self._card(entry)

    def _check_load(self, name: str, entry: Registered | None, place: str, in_place: bool) -> None:
        if entry is None:
            if len(self._entries) >= self.max_registered:
                raise StateError(f"{self.max_registered:,} adapters are registered already\n  unload some")
            return
        if entry.version is not None and not in_place:
            raise StateError(
                f"an adapter '{name}' is loaded already\n"
                '  unload it first, or replace it: "load_inplace": true; requests that run keep the old one'
            )
        if entry.origin == "command line" and place not in (entry.asked, entry.card.place):
            raise StateError(f"the name '{name}' was given on the server's command line\n  choose another name")

    def _activate(self, entry: Registered, version: Version, files: AdapterFiles, card: Card) -> None:
        """Let a name stand for a version, and let go of the one before."""
        before, old_files, was_pinned = entry.version, entry.files, entry.card.pinned
        entry.version, entry.files, entry.card, entry.failed = version, files, card, None
        if before is not None and old_files is not None:
            self.versions.drop_name(before, old_files, was_pinned)

    async def unload(self, name: str) -> int:
        """Unload an adapter and return the bytes freed, when its requests are done; new ones do not get it.

        A name that came over HTTP is forgotten. One of the command line or below a root stays registered: its next use
        reads its files anew. Raises UnknownAdapter, and WriteError if the state file cannot be written.
        """
        return await asyncio.shield(self._task(self._unload(name)))

    async def _unload(self, name: str) -> int:
        async with self._lock(name):
            entry = self._entry(name)
            if entry.origin == "http":
                await self._save(name, None)
                del self._entries[name]
            version, files, pinned = entry.version, entry.files, entry.card.pinned
            entry.version = entry.files = entry.failed = None
            entry.card = replace(entry.card, status="registered", key=None, problem=None, chat=ChatRecord())
            if version is None or files is None:
                return 0
            freed = self.versions.drop_name(version, files, pinned)
        return await freed

    def _entry(self, name: str) -> Registered:
        if name not in self._entries:
            raise names.unknown(name, self._entries, self.base_names)
        return self._entries[name]

    def _over_http(self, place: str, name: str) -> Locate:
        return lambda: self.locations.over_http(place, name)

    async def _save(self, name: str, changed: Loaded | None) -> None:
        """Write the state file with one name changed, or without it."""
        if self._state is None:
            return
        async with self._writing:
            loaded = {
                one: Loaded(one, entry.card.place, entry.card.pinned, entry.card.created)
                for one, entry in self._entries.items()
                if entry.origin == "http" and one != name
            }
            if changed is not None:
                loaded[name] = changed
            await asyncio.to_thread(self._state.write, list(loaded.values()))

    def _lock(self, name: str) -> asyncio.Lock:
        """Return the lock of a name, which is held while it is loaded or unloaded."""
        return self._locks.setdefault(name, asyncio.Lock())

    def _task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run something that is to end even if who waits for it goes away."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # read, so that asyncio does not call it lost when nobody waits any more
