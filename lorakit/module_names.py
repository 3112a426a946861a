"""Which modules a setting names, by PEFT's rules: `targets` and `exclude`, and the keys of `rank_pattern` and `alpha_pattern`.

The keys of patterns are regular expressions, and the first one that matches counts.

PEFT's rule for a key and a module's name is `re.match(rf"(.*\\.)?({key})$", name)`. Adapters with ranks of their own have a key for each
of a thousand modules, and a thousand times a thousand matches take a minute. Nearly all of these keys are plain names, perhaps with "^"
before: they are looked up. In such a key a bare dot stands for any character; keys are grouped by where they have dots, and a name is
looked up, without the characters at those places, in each group of its length.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_PLAIN = re.compile(r"\^?(?:[A-Za-z0-9_]|\\?\.|\\?-)+")


def compiled(key: str) -> re.Pattern[str]:
    """PEFT's rule for a key. Raises re.error."""
    return re.compile(rf"(.*\.)?({key})$")


def plain(key: str) -> bool:
    """Whether a key is a name: no character of it is special in a regular expression, but for dots and a "^" before."""
    return _PLAIN.fullmatch(key) is not None


def ends_with(module: str, ending: str) -> bool:
    """Whether a module's full name is `ending` or ends in `.ending` (PEFT's rule for lists)."""
    return module == ending or module.endswith("." + ending)


def matches(module: str, names: str | list[str]) -> bool:
    """A list matches by ending, a string as a regular expression for the whole name (PEFT's rules)."""
    if isinstance(names, list):
        return any(ends_with(module, name) for name in names)
    return re.fullmatch(names, module) is not None


def pattern_matches(key: str, module: str) -> bool:
    """PEFT's rule for the keys of rank_pattern and alpha_pattern."""
    return compiled(key).match(module) is not None


class Patterns:
    """`value(name)`: that of the first key that matches."""

    def __init__(self, pattern: Mapping[str, Any]):
        self.keys, self.values = list(pattern), list(pattern.values())
        self.expressions: list[tuple[int, re.Pattern[str]]] = []  # the keys that are no plain names
        # (anchored, length, places of the bare dots) -> {the other characters: number of the first such key}
        self.names: dict[bool, dict[int, dict[tuple[int, ...], dict[str, int]]]] = {True: {}, False: {}}
        for number, key in enumerate(pattern):
            if plain(key):
                self._add(number, key)
            else:
                self.expressions.append((number, compiled(key)))

    def value(self, name: str, default: Any) -> Any:
        number = self.first(name)
        return default if number is None else self.values[number]

    def first(self, name: str) -> int | None:
        """The number of the first key that matches, None if none does."""
        if "\n" in name:  # no dot matches it, and "$" passes over it: matched one by one
            return next((number for number, key in enumerate(self.keys) if compiled(key).match(name)), None)
        best = min(self._looked_up(name), default=len(self.values))
        for number, expression in self.expressions:
            if number > best:
                break
            if expression.match(name):
                return number
        return best if best < len(self.values) else None

    def _add(self, number: int, key: str) -> None:
        anchored, key = key.startswith("^"), key.removeprefix("^")
        # An escaped dot is itself, a bare one a place where any character may be.
        marks = re.findall(r"\\?.", key)
        dots = tuple(at for at, mark in enumerate(marks) if mark == ".")
        rest = "".join(mark[-1] for mark in marks if mark != ".")
        self.names[anchored].setdefault(len(marks), {}).setdefault(dots, {}).setdefault(rest, number)

    def _looked_up(self, name: str) -> Iterator[int]:
        yield from self._in(self.names[True], name)
        at = 0
        while True:  # the whole name, and what follows each of its dots
            yield from self._in(self.names[False], name[at:])
            at = name.find(".", at) + 1
            if not at:
                return

    @staticmethod
    def _in(groups: dict[int, dict[tuple[int, ...], dict[str, int]]], name: str) -> Iterator[int]:
        for dots, keys in groups.get(len(name), {}).items():
            pieces, start = [], 0
            for dot in dots:
                pieces.append(name[start:dot])
                start = dot + 1
            number = keys.get("".join([*pieces, name[start:]]))
            if number is not None:
                yield number
