"""Calls as JSON without markers, where the answer begins with them: Llama 3.1 to 3.3, and lorakit's plain template.

    {"name": "get_weather", "parameters": {"city": "Rome"}}        several: each on its line, or after a ";"
    <|python_tag|>brave_search.call(query="Rome")                  Llama's built-in tools

An answer that is JSON for another reason must not become a call, so its name has to be one of the request's tools.
"""

from __future__ import annotations

import re

from .blocks import Blocks
from .python_calls import arguments_of
from .syntax import JSON, ParsedCall, Parts, Syntax, Tools, call_of

PYTHON_TAG = "<|python_tag|>"
BETWEEN = "; \r\n\t"  # two calls
BUILT_IN = re.compile(r"\s*([\w.-]+)\.call\((.*)\)\s*", re.S)


def _calls(text: str, names: set[str]) -> list[ParsedCall] | None:
    text = text.strip().removeprefix(PYTHON_TAG).lstrip()
    built_in = BUILT_IN.fullmatch(text)
    if built_in is not None:
        arguments = arguments_of(f"f({built_in[2]})")
        return None if arguments is None else [ParsedCall(built_in[1], arguments)]
    found, at = [], 0
    while at < len(text):
        try:
            value, at = JSON.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        call = call_of(value)
        if call is None or call.name not in names:
            return None
        found.append(call)
        while at < len(text) and text[at] in BETWEEN:
            at += 1
    return found or None


def _parts(tools: Tools) -> Parts:
    names = {str(tool["function"]["name"]) for tool in tools}
    return Blocks(["{", PYTHON_TAG], [], lambda text: _calls(text, names), at_start=True, keep_begin=True)


def _writes(template: str) -> bool:
    return PYTHON_TAG in template or ('{"name": "' in template and '"parameters": ' in template)


LLAMA = Syntax("llama", (PYTHON_TAG,), _writes, _parts)
PLAIN = Syntax("plain", (), lambda template: False, _parts)  # chosen by style, not by a template
