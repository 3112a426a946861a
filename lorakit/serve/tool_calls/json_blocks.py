"""Calls as JSON between two markers: Hermes, and Qwen 2.5 and 3 after it.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Rome"}}
</tool_call>
"""

from __future__ import annotations

from .blocks import tool_call_blocks
from .syntax import ParsedCall, Syntax, Tools, call_of, json_of


def _call(text: str, tools: Tools) -> ParsedCall | None:
    return call_of(json_of(text))


def _writes(template: str) -> bool:
    others = ("<function=", "<arg_key>")  # the same markers around something else
    return "<tool_call>" in template and not any(other in template for other in others)


HERMES = Syntax("hermes", ("<tool_call>", "</tool_call>"), _writes, tool_call_blocks(_call))
