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

from .blocks import tool_call_blocks
from .syntax import ParsedCall, Syntax, Tools, elements_of, parameters_of

FUNCTION = re.compile(r"\s*<function=([^>\n]+)>")
PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.S)


def _call(text: str, tools: Tools) -> ParsedCall | None:
    function = FUNCTION.match(text)
    if function is None:
        return None
    name, body = function[1].strip(), text[function.end() :].rstrip().removesuffix("</function>")
    arguments = elements_of(body, PARAMETER, parameters_of(tools, name))
    return None if arguments is None else ParsedCall(name, arguments)


def _writes(template: str) -> bool:
    return "<function=" in template and "<parameter=" in template


XML_PARAMETERS = Syntax("xml-parameters", ("<tool_call>", "</tool_call>"), _writes, tool_call_blocks(_call))
