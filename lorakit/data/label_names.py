"""The names of labels: in which order they are numbered, and which number a row's label has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..errors import DataError, did_you_mean, listing


def ordered(found: Iterable[str]) -> list[str]:
    """Return the different labels in alphabetical order, numbers by size."""
    names = set(found)
    return sorted(names, key=int) if all(name.lstrip("-").isdigit() for name in names) else sorted(names)


def number_of(label: str, names: Sequence[str], where: str) -> int:
    """Return a label's number: its place in `names`, or the number that it is where the data has numbers.

    `where`: names the row. Raises DataError for a label that is none of these.
    """
    if label in names:
        return names.index(label)
    if label.isdigit() and int(label) < len(names):  # the data has numbers, the settings their names
        return int(label)
    raise DataError(
        f"{where}: the label '{label}' is none of {len(names)}{did_you_mean(label, names)}\n"
        f"  labels: {listing(names, 20)}"
    )
