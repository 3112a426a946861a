"""Which modules' weights a forward uses itself: `F.linear(x, self.gate.weight)` instead of `self.gate(x)`.

An adapted module adds its update when it is called, so where only its weight is read the update would have no effect.
That is read from the bytecode of `forward` and of the methods that it reaches, once per class. It needs no input and no
run, and does not depend on a class's name. What it cannot see (a weight handed over by another module) it does not
report.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

_LOADS = ("LOAD_ATTR", "LOAD_METHOD")
# `self.wo.weight.dtype` asks about the weight and computes nothing with it.
_ABOUT = frozenset({"dtype", "device", "shape", "size", "ndim", "dim", "is_meta", "requires_grad", "data_ptr"})


class Reads(NamedTuple):
    """Children by name (dotted for deeper ones): those whose weight is read, and those that are called or passed on."""

    read: frozenset[str]
    called: frozenset[str]


_known: WeakKeyDictionary[type, Reads] = WeakKeyDictionary()


def reads_of(cls: type[nn.Module]) -> Reads:
    """Return what a class's forward reads and calls of its children. Nothing for torch's own classes."""
    found = _known.get(cls)
    if found is None:
        found = _known[cls] = _reads(cls)
    return found


def _reads(cls: type[nn.Module]) -> Reads:
    read: set[str] = set()
    called: set[str] = set()
    seen: set[str] = set()
    to_visit = ["forward"]
    while to_visit:
        name = to_visit.pop()
        code = None if name in seen else _code_of(cls, name)
        seen.add(name)
        if code is None:
            continue
        for chain in _chains(code):
            to_visit.append(chain[0])  # a method, perhaps
            if "weight" not in chain:
                called.add(".".join(chain).removesuffix(".forward"))
                continue
            at = chain.index("weight")
            if at and not _ABOUT.intersection(chain[at + 1 : at + 2]):
                read.add(".".join(chain[:at]))
    return Reads(frozenset(read), frozenset(called))


def _code_of(cls: type, name: str) -> CodeType | None:
    """The bytecode of a method, decorators taken off; None for what is no Python function, or is torch's own."""
    owner = next((c for c in cls.__mro__ if name in c.__dict__), None)
    if owner is None or owner.__module__.partition(".")[0] == "torch":
        return None
    function = inspect.unwrap(owner.__dict__[name]) if callable(owner.__dict__[name]) else None
    return getattr(function, "__code__", None)


def _chains(code: CodeType) -> Iterator[list[str]]:
    """Yield the attributes of each `self.a.b.c` in a function and in the functions inside it: ["a", "b", "c"]."""
    chain: list[str] | None = None
    for instruction in dis.get_instructions(code):
        if chain is not None and instruction.opname in _LOADS:
            chain.append(instruction.argval)
            continue
        if chain:
            yield chain
        chain = None
        if instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
            names = instruction.argval  # from Python 3.13 on, one instruction may load two
            chain = [] if (names[-1] if isinstance(names, tuple) else names) == "self" else None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _chains(constant)
