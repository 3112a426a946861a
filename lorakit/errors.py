"""What lorakit raises, and how its messages are built: what was wrong, where, what was expected, the fix.

Every error a user can cause is a `LorakitError`; the command line prints it without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LorakitError(Exception):
    """Something the user can act on. The first line says what and where, further lines what was expected and the fix."""


class ConfigError(LorakitError, ValueError):
    """A setting that is unknown, out of range or contradicts another."""


class TargetError(LorakitError, ValueError):
    """A target, pattern or key that fits no module of the model, or a module that cannot be adapted."""


class AdapterError(LorakitError, ValueError):
    """An adapter (value or file) that is malformed, or does not fit the base it meets."""


class StateError(LorakitError, RuntimeError):
    """A call that does not fit what is attached: a name in use, an unknown name, merging twice."""


class DataError(LorakitError, ValueError):
    """A dataset that cannot be read or understood; names file and row."""


class TrainError(LorakitError, RuntimeError):
    """A training run that cannot start or go on."""


class WriteError(LorakitError, OSError):
    """A file or folder that cannot be written: a place that is taken, forbidden or full."""


class NotFiniteError(LorakitError, RuntimeError):
    """A loss that is NaN or infinite."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None if none is alike."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"`, or nothing."""
    found = nearest(name, known)
    return f"; did you mean '{found}'?" if found else ""


def listing(names: Iterable[str], most: int = 5) -> str:
    """The first names, then how many more there are."""
    names = list(names)
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
