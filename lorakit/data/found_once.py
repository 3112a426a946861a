"""A property that is worked out once for each object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

Value = TypeVar("Value")


class found_once(Generic[Value]):
    """`functools.cached_property` without its lock, which before Python 3.12 all objects share.

    With it, a chat template that takes seconds for a trial would delay the trials of every other. Two threads may work
    out a value at once; both find the same.
    """

    def __init__(self, find: Callable[[Any], Value]):
        self._find, self.__doc__ = find, find.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> found_once[Value]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> Value: ...

    def __get__(self, instance: object | None, owner: type) -> found_once[Value] | Value:
        if instance is None:
            return self
        value = self._find(instance)
        vars(instance)[self._name] = value  # found before this descriptor from now on
        return value
