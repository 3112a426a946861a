"""The seam of tool calls: what a file of a syntax offers. `tests/contracts/test_tool_syntaxes.py` runs over all."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a number of JSON")
    return number


# Python's own decoder takes NaN and Infinity, and makes infinity of 1e999. A client that reads a call's arguments takes
# none of them. It raises ValueError or RecursionError.
JSON = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)
Tools = Sequence[Mapping[str, Any]]  # descriptions in OpenAI's form: {"type": "function", "function": {"name", ...}}


@dataclass(frozen=True)
class ParsedCall:
    """A call as a model wrote it: the function's name and its arguments."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Reasoning:
    """Reasoning, where a family writes it apart from what it answers."""

    text: str


Part = str | ParsedCall | Reasoning  # of an answer; a text is content


class Parts(Protocol):
    """Splits one answer, whose text arrives in pieces, into content and calls, in their order."""

    def feed(self, text: str) -> list[Part]:
        """Take more text. Return what is certain by now; the rest is held back."""

    def finish(self) -> list[Part]:
        """The answer is at its end. Return the rest."""


@dataclass(frozen=True)
class Syntax:
    """How a family writes calls.

    markers: the texts it is made of that may be special tokens. An answer's text leaves special tokens out (as
    `lorakit generate` does) except these, or a call could not be recognized. writes: whether a chat template (its text)
    writes calls so. parts: makes the splitter of one answer. always: answers without calls are divided by it too.
    """

    name: str
    markers: tuple[str, ...]
    writes: Callable[[str], bool]
    parts: Callable[[Tools], Parts]
    always: bool = False


def parameters_of(tools: Tools, name: str) -> Mapping[str, Any]:
    """Return the JSON schemas of a function's parameters by name; empty if the tools do not say."""
    for tool in tools:
        function = tool.get("function", tool)
        if function.get("name") == name:
            schema = function.get("parameters")
            properties = schema.get("properties") if isinstance(schema, Mapping) else None
            return properties if isinstance(properties, Mapping) else {}
    return {}


def value_of(text: str, schema: object) -> Any:
    """Return the value of an argument that a syntax writes without quotes: a text where the schema says so.

    Anything else is read as JSON; what is no JSON is a text.
    """
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind == "string" or (isinstance(kind, list) and set(kind) <= {"string"}):
        return text
    try:
        return JSON.decode(text)
    except (ValueError, RecursionError):
        return text


def elements_of(text: str, element: re.Pattern[str], schemas: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of elements that follow each other; None if the text has something else too.

    element: its groups are the argument's name and its value.
    """
    arguments, at = dict[str, Any](), 0
    while (found := element.match(text, at)) is not None:
        key = found[1].strip()
        arguments[key] = value_of(found[2], schemas.get(key))
        at = found.end()
    return None if text[at:].strip() else arguments


def call_of(value: object, keys: Sequence[str] = ("arguments", "parameters")) -> ParsedCall | None:
    """Return the call that a JSON value is: {"name": ..., "arguments": {...}}. None if it is not one.

    keys: what the arguments may be called. Arguments may be JSON text, as some models quote them.
    """
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments: object = next((value[key] for key in keys if key in value), {})
    if isinstance(arguments, str):
        try:
            arguments = JSON.decode(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            return None
    if arguments is None:
        arguments = {}
    return ParsedCall(value["name"], arguments) if isinstance(arguments, dict) else None


def json_of(text: str) -> Any:
    """Return the value of a JSON text, None if it is invalid (or null)."""
    try:
        return JSON.decode(text)
    except (ValueError, RecursionError):
        return None
