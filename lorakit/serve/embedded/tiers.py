"""Where adapters are: on the device (attached), in memory (built, not attached) or on disk (their source alone)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from ..engine import Source


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

    wake: called from other threads when there is something for `between_steps` to do; the engine sets it.
    """

    wake: Callable[[], None]

    def __init__(self, model: nn.Module, tokenizer: object = None, *, device: int = 32, memory_bytes: int = 2 << 30):
        """device: adapters that may be attached at once. memory_bytes: of those in memory and not attached."""
        raise NotImplementedError

    # The event loop's thread

    async def load(self, key: str, source: Source, *, pin: bool = False) -> None:
        """Read an adapter, check it against the model, and make it known. See `Engine.load`.

        A pinned one is attached when this returns, others as soon as there is a place. Raises AdapterError, TargetError
        or StateError for what cannot be served, and then nothing has changed.
        """
        raise NotImplementedError

    async def unload(self, key: str) -> int:
        """Forget an adapter when no request holds it (`claim`, `use`) any more. Return the bytes freed.

        Raises UnknownAdapter.
        """
        raise NotImplementedError

    def claim(self, keys: Sequence[str]) -> None:
        """Hold adapters for a request, from `submit` on until `release`, so that `unload` waits for it.

        Raises UnknownAdapter for one that is not loaded or is being unloaded, Cannot for more at once than the device
        has places for.
        """
        raise NotImplementedError

    def release(self, keys: Sequence[str]) -> None:
        """Undo one `claim`. May be called in either thread."""
        raise NotImplementedError

    def stats(self) -> TierStats:
        """Return counts as of now."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop the loading thread. What is attached stays."""
        raise NotImplementedError

    # The engine's thread

    def between_steps(self) -> None:
        """Attach what was read, evict for it, detach what is to be unloaded: a few milliseconds at most. Outside
        `route`.
        """
        raise NotImplementedError

    def ready(self, keys: Sequence[str]) -> bool:
        """Whether all these adapters are attached; else begin to bring them.

        Raises AdapterError if one of them cannot be read any more, UnknownAdapter if it is not loaded. Asked in order
        of arrival: places go to those who asked first, and one that waits for a place is not overtaken for ever.
        """
        raise NotImplementedError

    def use(self, keys: Sequence[str]) -> None:
        """Keep these adapters, which are ready, on the device until `done`. Counted: one `done` for each `use`."""
        raise NotImplementedError

    def done(self, keys: Sequence[str]) -> None:
        """Undo one `use`."""
        raise NotImplementedError
