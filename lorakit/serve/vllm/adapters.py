"""What vLLM has under which name: adapters by their key, and mixes of them.

vLLM applies one adapter to a request, with the scale in its file. A choice with other weights is therefore made into a
file of its own first: Σ wᵢ ΔWᵢ by concatenation, exact, of rank Σ rᵢ. It is made when it is first asked for, and kept
under a hash of its keys and weights; the least recently used mixes are unloaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...adapter.adapter import Adapter
from ...adapter.algebra.combine import combined
from ...adapter.update import Update
from ...errors import AdapterError, LorakitError
from ...export.export import export
from ...export.rules import findings
from ..engine import Choice, Source
from ..errors import Cannot, UnknownAdapter
from .argv import BASE_NAME, rank_flag
from .base import BaseShell
from .cache import ExportCache
from .http import VllmClient

log = logging.getLogger("lorakit.vllm")
MIXES = 64  # kept at once; each is a file and a name at vLLM


@dataclass(frozen=True)
class _Entry:
    """A folder that vLLM was given. size: bytes of its files. of: the keys that a mix is made of."""

    label: str
    path: Path
    size: int
    of: tuple[str, ...] = ()


class Adapters:
    """The adapters and mixes of one vLLM. Its methods are called in the event loop; files are read off it."""

    def __init__(self, shell: BaseShell, cache: ExportCache, max_rank: int):
        self.loads = 0
        self._shell = shell
        self._cache = cache
        self._max_rank = max_rank
        self._entries: dict[str, _Entry] = {}
        self._mixes: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._users: Counter[str] = Counter()  # of keys and of mixes
        self._leaving: dict[str, asyncio.Event] = {}  # key -> set when its last request is done
        self._making: dict[str, asyncio.Task[None]] = {}  # what is being loaded or forgotten

    def __len__(self) -> int:
        return len(self._entries) + len(self._mixes)

    @property
    def size(self) -> int:
        """Bytes of all files that vLLM was given."""
        return sum(entry.size for entry in (*self._entries.values(), *self._mixes.values()))

    def check(self, choice: Choice) -> None:
        """Raise UnknownAdapter for a key that is not loaded, or is being unloaded."""
        for key, _ in choice:
            if key not in self._entries or key in self._leaving:
                raise UnknownAdapter(f"no adapter is loaded under the key {key[:12]}")

    @contextlib.asynccontextmanager
    async def used(self, choice: Choice, client: VllmClient) -> AsyncIterator[str]:
        """Yield vLLM's name for a choice, whose adapters stay loaded inside the context.

        Raises UnknownAdapter, and Cannot for a mix that vLLM cannot be given.
        """
        self.check(choice)
        weights = _weights(choice)
        name = _name(weights)
        with self._using([*(key for key, _ in choice), name]):
            if name != BASE_NAME and name not in weights:
                await self._mix(name, weights, client)
            yield name

    async def load(self, key: str, source: Source, client: VllmClient) -> None:
        """Read, check, export and load an adapter. Raises AdapterError with the reason if it cannot be served."""
        if key in self._leaving:
            raise UnknownAdapter(f"'{source.label}' is being unloaded; ask again when that is done")

        async def make() -> None:
            self._entries[key] = await self._given(key, source.label, source.read, client)

        while key not in self._entries:  # again, if it was just being forgotten
            await asyncio.shield(self._started(key, make))

    async def unload(self, key: str, client: VllmClient | None) -> int:
        """Wait for an adapter's requests and let vLLM forget it and its mixes. Return the bytes of its file."""
        self.check(((key, 1.0),))
        idle = self._leaving[key] = asyncio.Event()
        try:
            if self._users[key]:
                await idle.wait()
        finally:
            del self._leaving[key]
        entry = self._entries.pop(key)
        mixes = [name for name, mix in self._mixes.items() if key in mix.of]
        for name in mixes:
            del self._mixes[name]
        await asyncio.wait([self._forgotten(name, client) for name in (*mixes, key)])
        return entry.size

    async def load_again(self, client: VllmClient) -> None:
        """Give everything to a vLLM that was started again. What it does not take is logged: asking for it is 404."""
        for name, entry in [*self._entries.items(), *self._mixes.items()]:
            try:
                await client.load(name, entry.path)
            except AdapterError as error:
                log.error("'%s' could not be loaded again: %s", entry.label, error)

    def close(self) -> None:
        """Let go of the cache's folders."""
        for name in (*self._entries, *self._mixes):
            self._cache.release(name)
        self._entries.clear()
        self._mixes.clear()

    async def _mix(self, name: str, weights: dict[str, float], client: VllmClient) -> None:
        """See that vLLM has a mix, and unload those used least recently."""

        async def make() -> None:
            with self._using(list(weights)):  # by itself: whoever asked for it may have hung up
                paths = [self._entries[key].path for key in weights]
                label = " + ".join(f"{weight:g} · {self._entries[key].label}" for key, weight in weights.items())
                try:
                    made = await self._given(name, label, lambda: _mixed(paths, list(weights.values())), client)
                except AdapterError as error:
                    what = "mix" if len(weights) > 1 else "scale"
                    raise Cannot(f"vLLM cannot serve {label}: {error}", what) from error
                self._mixes[name] = replace(made, of=tuple(weights))

        while name not in self._mixes:
            await asyncio.shield(self._started(name, make))
        self._mixes.move_to_end(name)
        unused = [other for other in self._mixes if not self._users[other]]
        for other in unused[: max(len(self._mixes) - MIXES, 0)]:
            del self._mixes[other]
            await asyncio.shield(self._forgotten(other, client))

    def _started(self, name: str, make: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        """Return the task that loads or forgets this name; without one, a new one that runs `make`.

        Wait for it behind a shield: it goes on for others if a caller hangs up.
        """
        task = self._making.get(name)
        if task is None:
            task = self._making[name] = asyncio.create_task(make())

            def done(ended: asyncio.Task[None]) -> None:
                del self._making[name]
                _ = ended.cancelled() or ended.exception()  # seen, also if nobody waits any more

            task.add_done_callback(done)
        return task

    @contextlib.contextmanager
    def _using(self, names: list[str]) -> Iterator[None]:
        """Count a user of these keys and mixes inside the context."""
        self._users.update(names)
        try:
            yield
        finally:
            for name in names:
                self._users[name] -= 1
                if not self._users[name]:
                    del self._users[name]
                    if name in self._leaving:
                        self._leaving[name].set()

    async def _given(self, name: str, label: str, read: Callable[[], Adapter], client: VllmClient) -> _Entry:
        """Export what `read` returns, unless the cache has it, and load it under `name`."""
        path = await asyncio.to_thread(self._exported, name, label, read)
        try:
            await client.load(name, path)
        except BaseException:
            self._cache.release(name)
            raise
        self.loads += 1
        return _Entry(label, path, sum(file.stat().st_size for file in path.iterdir()))

    def _exported(self, name: str, label: str, read: Callable[[], Adapter]) -> Path:
        """Return the cache's folder of an adapter. Runs in a thread."""
        adapter = read()
        refused = [finding for finding in findings(adapter, "vllm") if finding.fix is None]
        if refused:
            lines = "\n".join(f"  {finding.what}\n    {finding.way_out}" for finding in refused)
            raise AdapterError(f"vLLM cannot serve this adapter:\n{lines}\n  the embedded engine serves more kinds")
        self._shell.check(adapter)
        path = self._cache.hold(name, lambda to: export(adapter, to, "vllm", fix=True, verify=True))
        rank = int(json.loads((path / "adapter_config.json").read_text(encoding="utf8"))["r"])
        if rank > self._max_rank:
            self._cache.release(name)
            raise AdapterError(
                f"'{label}' needs rank {rank}, and vLLM was started for ranks up to {self._max_rank}, which it "
                f"cannot change\n  start the server with --max-rank {rank_flag([rank])}, or lower the rank: lorakit "
                f"resize --rank {self._max_rank}"
            )
        return path

    def _forgotten(self, name: str, client: VllmClient | None) -> asyncio.Task[None]:
        """Return the task that lets vLLM forget a name. Whoever asks for it meanwhile waits, and loads it again."""

        async def forget() -> None:
            if client is not None:
                await client.unload(name)
            self._cache.release(name)

        return self._started(name, forget)


def _weights(choice: Choice) -> dict[str, float]:
    """Return the weight of each key, without those of weight 0."""
    weights: dict[str, float] = {}
    for key, weight in choice:
        weights[key] = weights.get(key, 0.0) + weight
    return {key: weight for key, weight in sorted(weights.items()) if weight}


def _name(weights: dict[str, float]) -> str:
    """Return vLLM's name: the base, an adapter as it is, or a hash for everything else."""
    if not weights:
        return BASE_NAME
    [*keys] = weights
    if len(keys) == 1 and weights[keys[0]] == 1.0:
        return keys[0]
    return hashlib.sha256(json.dumps(["mix", *weights.items()]).encode()).hexdigest()


def _mixed(paths: list[Path], weights: list[float]) -> Adapter:
    """Return Σ wᵢ ΔWᵢ of exported adapters: their files in the cache, since the user's may have changed."""
    try:
        return combined([_unpadded(Adapter.load(path)) for path in paths], weights).adapter
    except AdapterError:
        raise
    except LorakitError as error:
        raise AdapterError(str(error)) from error


def _unpadded(adapter: Adapter) -> Adapter:
    """Return the adapter without the zeros that filled its ranks up: a mix's rank is the sum of what is left."""
    updates: dict[str, Update] = dict(adapter.updates)
    for module, f in adapter.factors.items():
        used = (f.A.flatten(1).any(1) & f.B.transpose(0, 1).flatten(1).any(1)).nonzero().flatten()
        if 0 < len(used) < f.rank:
            updates[module] = replace(f, A=f.A[used], B=f.B[:, used], alpha=f.scale * len(used), rslora=False)
    return replace(adapter, updates=updates)
