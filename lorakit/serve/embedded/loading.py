"""Threads that read adapters and build them for the model while the engine's thread runs steps.

    reading     off the model: files, checks, casts
    preparing   reads the model's modules, so nothing may be attached or detached meanwhile; forwards may run
    attaching   the engine's thread, between two steps; it never waits for the others: they take turns
    moving      between an accelerator's memory and ours: a thread of its own, which no slow disk holds up

One adapter at most is built and not taken by the engine's thread, so that it gets its turn however many are read.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...adapter.adapter import Adapter
from ...errors import AdapterError, LorakitError
from ...model.prepared import Prepared, prepare
from .served import check_kind, check_modules, in_precision
from .workers import Workers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from ..engine import Source
    from .calls import Calls

READERS = 2  # one more may wait for a slow disk; those that come after two such wait for them
Arrived = Prepared | Adapter | AdapterError  # an Adapter is for the engine's thread to prepare


class Loader:
    """Reads and prepares adapters in its own threads.

    checked: called in them with the key of one about which nothing can fail any more, before it arrives; whoever takes
    it may forget the key at once. arrived: called after there is something to `take`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        calls: Calls,
        checked: Callable[[str], None],
        arrived: Callable[[], None],
    ):
        self._model, self._tokenizer, self._calls = model, tokenizer, calls
        self._is_checked, self._has_arrived = checked, arrived
        self._dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.swapping = False  # whether forwards put other parameters in the base's place: then they cannot be read
        self._turns = threading.Condition()
        self._arrived: deque[tuple[str, Arrived]] = deque()
        self._preparing = self._changing = self._closed = False
        self._readers, self._mover = Workers("lorakit-read", READERS), Workers("lorakit-move", 1)

    def read(self, key: str, source: Source) -> None:
        """Begin to read and prepare an adapter."""
        self._readers.run(lambda: self._bring(key, source))

    def run(self, job: Callable[[], None]) -> None:
        """Run something short that leaves the model's modules alone. It must not raise."""
        self._mover.run(job)

    def park(self, key: str, prepared: Prepared, label: str) -> None:
        """Move an adapter that is not attached from an accelerator's memory to ours. It arrives again."""
        self._mover.run(lambda: self._move(key, prepared, prepared.park, label))

    def fetch(self, key: str, prepared: Prepared, label: str) -> None:
        """Move a parked adapter back. It arrives again."""
        self._mover.run(lambda: self._move(key, prepared, prepared.unpark, label))

    @property
    def has_arrived(self) -> bool:
        """Whether there is something to take."""
        return bool(self._arrived)

    @contextmanager
    def turn(self) -> Iterator[bool]:
        """Return a context in which nothing is prepared, so that adapters can be attached and detached; False at once
        if something is being prepared now.
        """
        with self._turns:
            free = not self._preparing
            self._changing = free
        try:
            yield free
        finally:
            if free:
                with self._turns:
                    self._changing = False
                    self._turns.notify_all()

    def take(self) -> list[tuple[str, Arrived]]:
        """Return what has arrived since, by key."""
        with self._turns:
            taken = list(self._arrived)
            self._arrived.clear()
            return taken

    def prepare(self, key: str, adapter: Adapter, label: str) -> Prepared | AdapterError:
        """Check an adapter against the model and build it. Only in turn. Errors are returned, for `label`."""
        try:
            prepared = prepare(self._model, adapter, key)
            check_modules(prepared, self._model, self._calls)
        except Exception as error:
            return refusal(label, error)
        return prepared

    def close(self) -> None:
        """Begin nothing more. Waits for what is being built, as that reads the model's modules, and for nothing else:
        what is read after this is dropped.
        """
        with self._turns:
            self._closed = True
            self._turns.notify_all()
        self._readers.close()
        self._mover.close()
        with self._turns:
            while self._preparing:
                self._turns.wait()

    # The threads

    def _move(self, key: str, prepared: Prepared, move: Callable[[], None], label: str) -> None:
        try:
            move()
        except Exception as error:  # the accelerator has no memory left
            self._arrive(key, refusal(label, error))
        else:
            self._arrive(key, prepared)

    def _bring(self, key: str, source: Source) -> None:
        try:
            adapter = source.read()
            check_kind(adapter, self._model, self._tokenizer)
            adapter = in_precision(adapter, self._dtype)
        except Exception as error:
            self._arrive(key, refusal(source.label, error))
            return
        with self._turns:
            while (self._preparing or self._changing or self._arrived) and not self._closed:
                self._turns.wait()
            if self._closed:
                return
            self._preparing = aside = not self.swapping
        result = self.prepare(key, adapter, source.label) if aside else adapter
        if isinstance(result, Prepared) and result.is_built:
            self._is_checked(key)
        self._arrive(key, result, ends_turn=aside)

    def _arrive(self, key: str, result: Arrived, ends_turn: bool = False) -> None:
        """Leave an adapter, or why there is none, for the engine's thread."""
        with self._turns:
            if ends_turn:
                self._preparing = False
            self._arrived.append((key, result))
            self._turns.notify_all()
        self._has_arrived()


def refusal(label: str, error: Exception) -> AdapterError:
    """Return the error for an adapter that cannot be served, by name."""
    what = str(error) if isinstance(error, LorakitError) else f"{type(error).__name__}: {error}"
    found = AdapterError(f"adapter '{label}' cannot be served: {what}")
    found.__cause__ = error
    return found
