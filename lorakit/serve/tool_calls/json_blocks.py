"""Calls as JSON between two markers: Hermes, and Qwen 2.5 and 3 after it.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Rome"}}
</tool_call>
"""

from __future__ import annotations

from .blocks import Blocks
from .syntax import ParsedCall, Parts, Syntax, Tools, call_of, json_of


def _parse(text: str) -> list[ParsedCall] | None:
    call = call_of(json_of(text))
    return None if call is None else [call]


def _parts(tools: Tools) -> Parts:
    return Blocks(["<tool_call>"], ["</tool_call>"], _parse)


def _writes(template: str) -> bool:
    others = ("<function=", "<arg_key>")  # the same markers around something else
    return "<tool_call>" in template and not any(other in template for other in others)


HERMES = Syntax("hermes", ("<tool_call>", "</tool_call>"), _writes, _parts)
