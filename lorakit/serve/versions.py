"""The contents that the engine holds, by the hash of their files, each with a count of those who use it.

A version is used by the names that stand for it and by the requests that run with it. When the last one lets go, it is
unloaded from the engine. So a name can get new content while requests with the old one go on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from ..errors import AdapterError, TargetError
from .engine import Engine
from .sources import AdapterFiles, FileSource, ReadAdapter

log = logging.getLogger(__name__)


@dataclass
class Version:
    """One content. `users`: names and leases; `names`, `pins`: how many names stand for it, and how many pin it."""

    key: str
    source: FileSource
    users: int = 0
    names: int = 0
    pins: int = 0
    loaded: bool = False
    pinned: bool = False  # as the engine knows it
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while the engine loads or unloads it
    waiting: list[asyncio.Future[int]] = field(default_factory=list)  # for the bytes freed


class Versions:
    """Loads contents into the engine and out of it. All methods are called in the event loop's thread."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._versions: dict[str, Version] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._versions)

    async def bring(self, read: ReadAdapter, files: AdapterFiles, base: Any, pin: bool) -> Version:
        """Make a content usable for one more name.

        Raises AdapterError, with the name, for what does not fit the base or this engine, and what else `Engine.load`
        raises; nothing is changed then.
        """
        version = self._versions.get(read.key)
        if version is None:
            source = FileSource(read.key, [files], base, read.adapter)
            version = self._versions[read.key] = Version(read.key, source)
        elif files not in version.source.files:
            version.source.files.append(files)
        version.users += 1
        version.names += 1
        version.pins += pin
        try:
            async with version.changing:
                if not version.loaded:
                    version.source.first = read.adapter
                    await self.engine.load(read.key, version.source, pin=version.pins > 0)
                    version.loaded, version.pinned = True, version.pins > 0
            await self._pin(version)
        except BaseException as error:
            self.drop_name(version, files, pin)
            if isinstance(error, AdapterError | TargetError) and f"'{files.label}'" not in str(error):
                raise AdapterError(f"adapter '{files.label}' cannot be served: {error}") from error
            raise
        finally:
            version.source.first = None  # the engine has its values, or needs none
        for future in version.waiting:
            if not future.done():
                future.set_result(0)  # another name keeps what was to be unloaded
        return version

    def use(self, version: Version) -> None:
        """Count a request that runs with a version."""
        version.users += 1

    def release(self, version: Version) -> None:
        """Count a request that is done; unload the version, in the background, if it was the last user."""
        version.users -= 1
        if version.users == 0:
            self._start(self._retire(version))

    def drop_name(self, version: Version, files: AdapterFiles, pin: bool) -> asyncio.Future[int]:
        """Count a name that stands for a version no more.

        Returns a future of the bytes that were freed: done when the version's last request is, with 0 at once if other
        names stand for it.
        """
        version.names -= 1
        version.pins -= pin
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if version.names:
            if len(version.source.files) > 1 and files in version.source.files:
                version.source.files.remove(files)
            self._start(self._pin(version))
            future.set_result(0)
        else:
            version.waiting.append(future)
        self.release(version)
        return future

    async def close(self) -> None:
        """Wait for what is being loaded out of the engine."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _pin(self, version: Version) -> None:
        """Tell the engine if the version is pinned now and was not, or the other way round."""
        async with version.changing:
            pinned = version.pins > 0
            if version.loaded and version.pinned != pinned:
                await self.engine.load(version.key, version.source, pin=pinned)
                version.pinned = pinned

    async def _retire(self, version: Version) -> None:
        freed = 0
        async with version.changing:
            if version.users:  # somebody came while the engine was busy with it
                return
            if version.loaded:
                version.loaded = version.pinned = False
                try:
                    freed = await self.engine.unload(version.key)
                except Exception:  # an operator's matter: whoever was the last to use it has had its answer
                    log.exception("unloading the adapter %s failed", version.source.label)
            if not version.users and self._versions.get(version.key) is version:
                del self._versions[version.key]
        for future in version.waiting:
            if not future.done():
                future.set_result(freed)
        version.waiting.clear()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
