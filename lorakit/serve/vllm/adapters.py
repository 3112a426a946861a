"""What vLLM has under which name: adapters by their key, and mixes of them.

vLLM applies one adapter to a request, with the scale in its file. A choice with other weights is therefore made into a
file of its own first: Σ wᵢ ΔWᵢ by concatenation, exact, of rank Σ rᵢ. It is made when it is first asked for, and kept
under a hash of its keys and weights; the least recently used mixes are unloaded.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...adapter.adapter import Adapter
from ...adapter.algebra.combine import combined
from ...adapter.update import Update
from ...errors import AdapterError, LorakitError
from ...export.export import export
from ...export.rules import findings
from ..engine import Choice, Source, choice_of
from ..errors import Cannot, EngineFailed, UnknownAdapter
from .argv import BASE_NAME, rank_flag
from .base import BaseShell
from .cache import ExportCache
from .http import VllmClient

log = logging.getLogger("lorakit.vllm")
# Mixes kept, beside those in use: each is a file on disk and a name at vLLM, and a client that tries many weights must
# not fill either.
MIXES = 64


@dataclass(frozen=True)
class _Given:
    """A folder that vLLM was given. size: bytes of its files. of: the keys that a mix is made of."""

    label: str
    path: Path
    size: int
    of: tuple[str, ...] = ()


class Adapters:
    """The adapters and mixes of one vLLM. Its methods are called in the event loop; files are read off it."""

    def __init__(self, shell: BaseShell, cache: ExportCache, max_rank: int, client: Callable[[], VllmClient]):
        """client: returns the one of the vLLM that runs now; raises EngineFailed while there is none."""
        self.loads = 0
        self._shell = shell
        self._cache = cache
        self._max_rank = max_rank
        self._client = client
        self._loaded: dict[str, _Given] = {}
        self._mixes: OrderedDict[str, _Given] = OrderedDict()  # least recently used first
        self._users: Counter[str] = Counter()  # of keys and of mixes
        self._leaving: dict[str, asyncio.Future[int]] = {}  # key -> the bytes, once its last request is done
        self._making: dict[str, asyncio.Task[None]] = {}  # what is being loaded or forgotten

    def __len__(self) -> int:
        return len(self._loaded) + len(self._mixes)

    @property
    def size(self) -> int:
        """Bytes of all files that vLLM was given."""
        return sum(given.size for given in (*self._loaded.values(), *self._mixes.values()))

    def claim(self, choice: Choice) -> None:
        """Hold a choice's adapters for a request, from `submit` on until `release`, so that `unload` waits for it.

        Raises UnknownAdapter for a key that is not loaded, or is being unloaded.
        """
        for key, _ in choice:
            given = self._known(key)
            if key in self._leaving:
                raise UnknownAdapter(f"adapter '{given.label}' is being unloaded\n  load it again first")
        self._users.update(_names(choice))

    def release(self, choice: Choice) -> None:
        """Undo one `claim`."""
        self._drop(_names(choice))

    async def name(self, choice: Choice) -> str:
        """Return vLLM's name for a choice that is claimed. Raises Cannot for a mix that vLLM cannot be given."""
        weights = dict(choice_of(choice))
        name = _name(weights)
        if name != BASE_NAME and name not in weights:
            await self._mix(name, weights)
        return name

    async def load(self, key: str, source: Source) -> None:
        """Read, check, export and load an adapter; one that is being unloaded stays.

        Raises AdapterError with the reason if it cannot be served.
        """
        leaving = self._leaving.pop(key, None)
        if leaving is not None:
            leaving.set_result(0)

        async def make() -> None:
            self._loaded[key] = await self._given(key, source.label, source.read)

        while key not in self._loaded:  # again, if it was just being forgotten
            await asyncio.shield(self._started(key, make))

    async def unload(self, key: str) -> int:
        """Let vLLM forget an adapter and its mixes when no request holds it. Return the bytes of its file.

        Raises UnknownAdapter.
        """
        self._known(key)
        leaving = self._leaving.get(key)
        if leaving is None:
            leaving = self._leaving[key] = asyncio.get_running_loop().create_future()
            self._leave(key)
        return await asyncio.shield(leaving)

    async def load_again(self, client: VllmClient) -> None:
        """Give everything to a vLLM that was started again. What it does not take is logged: asking for it is 404."""
        for name in [*self._loaded, *self._mixes]:
            given = self._loaded.get(name) or self._mixes.get(name)
            if given is None:  # unloaded meanwhile
                continue
            try:
                await client.load(name, given.path)
            except AdapterError as error:
                log.error("'%s' could not be loaded again: %s", given.label, error)

    def close(self) -> None:
        """Let go of the cache's folders."""
        for name in (*self._loaded, *self._mixes):
            self._cache.release(name)
        self._loaded.clear()
        self._mixes.clear()

    def _known(self, key: str) -> _Given:
        given = self._loaded.get(key)
        if given is None:
            raise UnknownAdapter(f"no adapter is loaded under the key {key[:12]}\n  load it first")
        return given

    def _leave(self, key: str) -> None:
        """Let vLLM forget a key that is to be unloaded, if it has no users any more, and its mixes with it."""
        if key not in self._leaving or self._users[key]:
            return
        leaving, given = self._leaving.pop(key), self._loaded.pop(key)
        mixes = [name for name, mix in self._mixes.items() if key in mix.of]
        for name in mixes:
            del self._mixes[name]
        tasks = [self._forgotten(name) for name in (*mixes, key)]
        asyncio.gather(*tasks, return_exceptions=True).add_done_callback(lambda _: leaving.set_result(given.size))

    async def _mix(self, name: str, weights: dict[str, float]) -> None:
        """See that vLLM has a mix, and unload those used least recently."""

        async def make() -> None:
            self._users.update(weights.keys())  # by itself: whoever asked for it may have hung up
            try:
                paths = [self._loaded[key].path for key in weights]
                label = " + ".join(f"{weight:g} · {self._loaded[key].label}" for key, weight in weights.items())
                try:
                    made = await self._given(name, label, lambda: _mixed(paths, list(weights.values())))
                except AdapterError as error:
                    what = "mix" if len(weights) > 1 else "scale"
                    raise Cannot(f"vLLM cannot serve {label}: {error}", what) from error
                self._mixes[name] = replace(made, of=tuple(weights))
            finally:
                self._drop(weights)

        while name not in self._mixes:
            await asyncio.shield(self._started(name, make))
        self._mixes.move_to_end(name)
        # Looked for anew each time: while one is unloaded, others come and go, and get users.
        while len(self._mixes) > MIXES and (unused := next((m for m in self._mixes if not self._users[m]), None)):
            del self._mixes[unused]
            await asyncio.shield(self._forgotten(unused))

    def _started(self, name: str, make: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        """Return the task that loads or forgets this name; without one, a new one that runs `make`.

        Wait for it behind a shield: it goes on for others if a caller hangs up.
        """
        task = self._making.get(name)
        # Of one that is done the callback may not have run; a loop that awaits it would never let it.
        return self._begun(name, make()) if task is None or task.done() else task

    def _begun(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._making[name] = asyncio.create_task(work)

        def done(ended: asyncio.Task[None]) -> None:
            if self._making.get(name) is ended:
                del self._making[name]
            _ = ended.cancelled() or ended.exception()  # seen, also if nobody waits any more

        task.add_done_callback(done)
        return task

    def _drop(self, names: Iterable[str]) -> None:
        """Count one user less of each of these keys and mixes."""
        names = list(names)
        self._users -= Counter(names)  # without those that are left with none
        for name in names:
            self._leave(name)

    async def _given(self, name: str, label: str, read: Callable[[], Adapter]) -> _Given:
        """Export what `read` returns, unless the cache has it, and load it under `name`."""
        path = await asyncio.to_thread(self._exported, name, label, read)
        try:
            await self._client().load(name, path)
        except BaseException:
            self._cache.release(name)
            raise
        self.loads += 1
        return _Given(label, path, sum(file.stat().st_size for file in path.iterdir()))

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

    def _forgotten(self, name: str) -> asyncio.Task[None]:
        """Return a task that lets vLLM forget a name. Whoever asks for it meanwhile waits, and loads it again."""
        before = self._making.get(name)  # the task that made it, at its very end

        async def forget() -> None:
            if before is not None:
                await asyncio.wait([before])
            try:
                await self._client().unload(name)
            except EngineFailed as error:  # it is down, and has forgotten everything
                log.info("nothing to unload: %s", error)
            finally:
                self._cache.release(name)

        return self._begun(name, forget())


def _names(choice: Choice) -> set[str]:
    """Return what a request with this choice holds: its keys, also those of weight 0, and vLLM's name for it."""
    return {key for key, _ in choice} | {_name(dict(choice_of(choice)))}


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
