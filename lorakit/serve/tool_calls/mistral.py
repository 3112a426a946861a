"""Calls after Mistral's marker, up to the end of the answer.

[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Rome"}, "id": "a1b2c3d4e"}]      tokenizers v3, v7
[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{"city": "Rome"}                              v11; v13 without the id
"""

from __future__ import annotations

import re

from .blocks import Blocks
from .syntax import JSON, ParsedCall, Part, Parts, Syntax, Tools, call_of, json_of

BEGIN, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?\[ARGS\](.*)", re.S)


def _parse(text: str) -> list[Part] | None:
    if text.lstrip().startswith("["):
        return _array(text.lstrip())
    found: list[Part] = []
    for each in text.split(BEGIN):
        named = NAMED.fullmatch(each)
        arguments = None if named is None else json_of(named[2])
        if named is None or not isinstance(arguments, dict):
            return None
        found.append(ParsedCall(named[1], arguments))
    return found


def _array(text: str) -> list[Part] | None:
    try:
        values, end = JSON.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    calls = [call_of(value) for value in values]
    if not calls or None in calls:
        return None
    return [*(call for call in calls if call is not None), *([text[end:]] if text[end:].strip() else [])]


def _parts(tools: Tools) -> Parts:
    return Blocks([BEGIN], [], _parse)


def _writes(template: str) -> bool:
    return BEGIN in template


MISTRAL = Syntax("mistral", (BEGIN, ARGS, CALL_ID), _writes, _parts)
