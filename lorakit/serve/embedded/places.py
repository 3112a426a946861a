"""Who gets a place on the device: those who asked first, in place of those that were not used for the longest time.

Requests ask with all the adapters they need (a mix has several). What an earlier request has got is kept for it, so
that two mixes cannot take each other's places for ever. Where all places are in use, the least recently used adapter
takes no new rows and is replaced when its rows are done: a steady stream of requests for some keeps out no other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ...errors import listing
from ..errors import Cannot, NoPlace


@dataclass
class OnDevice:
    """An adapter on the device. `users`: rows that use it now; `used`: a count that grows with each use."""

    users: int
    used: int
    pinned: bool


@dataclass
class Arrangement:
    """`bring`: adapters that can have a place now, and whose it is (None: an empty one). `after`: those that get the
    place of one in use when its rows are done. Both in the order in which they were asked for.
    """

    bring: dict[str, str | None] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)


def arrange(requests: Iterable[Sequence[str]], held: Mapping[str, OnDevice], places: int) -> Arrangement:
    """Give places to what is asked for and not there. requests: the adapters of each, in the order in which they came.

    An adapter that is named as another's replacement has not left yet; it is asked for again once it has.
    """
    requests = list(requests)
    found, empty = Arrangement(), places - len(held)
    asked, kept, leaving = {key for keys in requests for key in keys}, set[str](), set[str]()
    oldest = sorted((key for key in held if not held[key].pinned), key=lambda key: held[key].used)
    idle = sorted((key for key in oldest if not held[key].users), key=lambda key: key in asked)  # sorts are stable
    busy = [key for key in oldest if held[key].users]
    for keys in requests:
        kept.update(key for key in keys if key not in leaving)
        for key in keys:
            if key in held or key in found.bring or key in found.after:
                continue
            if empty > 0:
                empty -= 1
                found.bring[key] = None
                continue
            victim = next((k for k in (*idle, *busy) if k not in kept and k not in leaving), None)
            if victim is None:
                return found  # nothing is left for later ones either
            leaving.add(victim)
            if held[victim].users:
                found.after[key] = victim
            else:
                found.bring[key] = victim
    return found


def check_pin(label: str, pinned: Collection[str], places: int) -> None:
    """Raise NoPlace if no place is left for one more pinned adapter. pinned: the names of those that are."""
    if len(pinned) >= places:
        names = listing([f"'{name}'" for name in pinned])
        raise NoPlace(
            f"adapter '{label}' cannot be pinned: all {places} places of the device are, by {names}\n"
            "  unload one of them, or start the server with more places: --device-adapters"
        )


def check_places(keys: Sequence[str], pinned: Collection[str], places: int) -> None:
    """Raise Cannot for more adapters than the device can have at once beside the pinned ones, by key."""
    needed, free = len(set(keys).difference(pinned)), places - len(pinned)
    if needed > free:
        beside = f" beside {len(pinned)} pinned ones" if pinned else ""
        raise Cannot(
            f"the request needs {needed} adapters at once; the device has places for {free}{beside}\n"
            "  mix fewer, or start the server with more places: --device-adapters",
            "mix",
        )
