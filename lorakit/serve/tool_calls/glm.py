"""Calls with elements for keys and values: GLM 4.5 and later.

<tool_call>get_weather
<arg_key>city</arg_key>
<arg_value>Rome</arg_value>
</tool_call>
"""

from __future__ import annotations

import re

from .blocks import Blocks
from .syntax import ParsedCall, Parts, Syntax, Tools, parameters_of, value_of

NAME = re.compile(r"\s*([^\s<]+)\s*")
# Atomic groups: a key ends at the first </arg_key>. Trying later ones takes time quadratic in the answer's length.
ARGUMENT = re.compile(r"\s*<arg_key>(?>(.*?)</arg_key>)\s*<arg_value>(?>(.*?)</arg_value>)", re.S)


def _call(text: str, tools: Tools) -> ParsedCall | None:
    name = NAME.match(text)
    if name is None:
        return None
    schemas, arguments, at = parameters_of(tools, name[1]), dict[str, object](), name.end()
    while (argument := ARGUMENT.match(text, at)) is not None:
        key = argument[1].strip()
        arguments[key] = value_of(argument[2], schemas.get(key))
        at = argument.end()
    return None if text[at:].strip() else ParsedCall(name[1], arguments)


def _parts(tools: Tools) -> Parts:
    def parse(text: str) -> list[ParsedCall] | None:
        call = _call(text, tools)
        return None if call is None else [call]

    return Blocks(["<tool_call>"], ["</tool_call>"], parse)


def _writes(template: str) -> bool:
    return "<arg_key>" in template and "<arg_value>" in template


MARKERS = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
GLM = Syntax("glm", MARKERS, _writes, _parts)
