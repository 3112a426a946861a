"""Calls with an element for each parameter: Qwen3-Coder, Qwen 3.5 and later, Nemotron 3.

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Rome
    </parameter>
    </function>
    </tool_call>

A value is text without quotes where the tool's schema says string, and JSON otherwise.
"""

from __future__ import annotations

import re

from .blocks import Blocks
from .syntax import ParsedCall, Parts, Syntax, Tools, parameters_of, value_of

FUNCTION = re.compile(r"\s*<function=([^>\n]+)>")
PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.S)


def _call(text: str, tools: Tools) -> ParsedCall | None:
    function = FUNCTION.match(text)
    if function is None:
        return None
    name, body = function[1].strip(), text[function.end() :].rstrip().removesuffix("</function>")
    schemas, arguments, at = parameters_of(tools, name), dict[str, object](), 0
    while (parameter := PARAMETER.match(body, at)) is not None:
        key = parameter[1].strip()
        arguments[key] = value_of(parameter[2], schemas.get(key))
        at = parameter.end()
    return None if body[at:].strip() else ParsedCall(name, arguments)


def _parts(tools: Tools) -> Parts:
    def parse(text: str) -> list[ParsedCall] | None:
        call = _call(text, tools)
        return None if call is None else [call]

    return Blocks(["<tool_call>"], ["</tool_call>"], parse)


def _writes(template: str) -> bool:
    return "<function=" in template and "<parameter=" in template


XML_PARAMETERS = Syntax("xml-parameters", ("<tool_call>", "</tool_call>"), _writes, _parts)
