"""Find and read adapters beside the event loop: the threads that the registry does it in."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .locations import Locate
from .sources import AdapterFiles, ReadAdapter, Stamp, read_adapter
from .threads import in_thread

THREADS = 2  # that read: hashing and parsing take processor time from the engine's steps


class Readers:
    """A few threads for all reading, and one for each search, as a disk or hub that does not answer holds it up."""

    def __init__(self, base: Any = None, check: Callable[[Mapping[str, Any]], Awaitable[None]] | None = None):
        """base: its folder or transformers config, which the GGUF of a Llama needs. check: gets an adapter's metadata.

        `check` raises AdapterError for what must not be loaded.
        """
        self.base, self._check = base, check
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="lorakit-adapters")

    async def locate(self, locate: Locate) -> tuple[AdapterFiles, Stamp]:
        """Return an adapter's files, and what tells whether they changed. Raises what `locate` does."""

        def look() -> tuple[AdapterFiles, Stamp]:
            files = locate()
            return files, files.stamp()

        return await in_thread(look, "lorakit-locate")

    async def read(self, files: AdapterFiles) -> ReadAdapter:
        """Read and check an adapter. Raises AdapterError and WriteError, see `read_adapter`."""
        read = await asyncio.get_running_loop().run_in_executor(self._threads, read_adapter, files, self.base)
        if self._check is not None:
            await self._check(read.adapter.metadata)
        return read

    def close(self) -> None:
        """Begin nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)
