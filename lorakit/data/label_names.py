"""The names of labels: in which order they are numbered, and which number a row's label has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..errors import DataError, did_you_mean, listing

_WHOLE = re.compile(r"-?\d+")


def ordered(found: Iterable[str]) -> list[str]:
    """Return the different labels in alphabetical order, numbers by size."""
    names = set(found)
    return sorted(names, key=int) if all(map(is_whole, names)) else sorted(names)


def is_whole(text: str) -> bool:
    """Whether a text is a whole number."""
    return _WHOLE.fullmatch(text) is not None


def by_number(label: str, names: Sequence[str]) -> int | None:
    """Return the number that a label is where the data has numbers and the settings their names; None otherwise.

    Among names of which some are numbers, such as "0", "2", "4", a "1" is a label that is not there.
    """
    if label.isdecimal() and int(label) < len(names) and not any(map(is_whole, names)):
        return int(label)
    return None


def number_of(label: str, names: Sequence[str], where: str) -> int:
    """Return a label's number: its place in `names`, or the number that it is where only the data has numbers.

    `where`: names the row. Raises DataError for a label that is none of these.
    """
    if label in names:
        return names.index(label)
    number = by_number(label, names)
    if number is not None:
        return number
    raise DataError(
        f"{where}: the label '{label}' is none of {len(names)}{did_you_mean(label, names)}\n"
        f"  labels: {listing(names, 20)}"
    )
