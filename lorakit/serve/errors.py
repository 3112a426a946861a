"""What an engine cannot do, as errors that the API turns into statuses."""

from __future__ import annotations

from typing import TypeVar

from ..errors import AdapterError, LorakitError

Error = TypeVar("Error", bound=LorakitError)


class Busy(LorakitError):
    """All slots and places in the queue are taken. `retry_after`: seconds after which to ask again."""

    def __init__(self, message: str, retry_after: float = 1.0):
        super().__init__(message)
        self.retry_after = retry_after


class Stopping(Busy):
    """The server stops: what it answers is cut off, and it takes no more."""


class TooLong(LorakitError, ValueError):
    """The prompt and its answer have more tokens than the context holds."""


class UnknownAdapter(LorakitError, LookupError):
    """No adapter is loaded under this key or name."""


class Cannot(LorakitError, ValueError):
    """The engine cannot do what is asked. `what`: the setting, such as "mix" or "logprobs"."""

    def __init__(self, message: str, what: str):
        super().__init__(message)
        self.what = what


class NoPlace(AdapterError):
    """An adapter cannot be pinned now: others take all places. It can when one of them is unloaded."""


class Unreachable(AdapterError):
    """What holds an adapter's files does not answer. `retry_after`: seconds after which to ask again."""

    def __init__(self, message: str, retry_after: float = 5.0):
        super().__init__(message)
        self.retry_after = retry_after


class EngineFailed(LorakitError, RuntimeError):
    """The engine broke while it computed. `heals`: whether asking again can succeed."""

    def __init__(self, message: str, heals: bool = True):
        super().__init__(message)
        self.heals = heals


def without_traceback(error: Error) -> Error:
    """Return a copy of an error to keep: the frames of its traceback would keep what they worked on in memory."""
    made = type(error).__new__(type(error), *error.args)
    made.__dict__.update(error.__dict__)
    return made
