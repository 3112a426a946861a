"""Calls with elements for keys and values: GLM 4.5 and later.

<tool_call>get_weather
<arg_key>city</arg_key>
<arg_value>Rome</arg_value>
</tool_call>
"""

from __future__ import annotations

import re

from .blocks import tool_call_blocks
from .syntax import ParsedCall, Syntax, Tools, elements_of, parameters_of

NAME = re.compile(r"\s*([^\s<]+)\s*")
# Atomic groups: a key ends at the first </arg_key>. Trying later ones takes time quadratic in the answer's length.
ARGUMENT = re.compile(r"\s*<arg_key>(?>(.*?)</arg_key>)\s*<arg_value>(?>(.*?)</arg_value>)", re.S)


def _call(text: str, tools: Tools) -> ParsedCall | None:
    name = NAME.match(text)
    if name is None:
        return None
    arguments = elements_of(text[name.end() :], ARGUMENT, parameters_of(tools, name[1]))
    return None if arguments is None else ParsedCall(name[1], arguments)


def _writes(template: str) -> bool:
    return "<arg_key>" in template and "<arg_value>" in template


MARKERS = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
GLM = Syntax("glm", MARKERS, _writes, tool_call_blocks(_call))
