"""Calls of Gemma 4: JSON whose keys have no quotes, and whose texts stand between marks.

<|tool_call>call:get_weather{city:<|"|>Rome<|"|>,days:3}<tool_call|>
"""

from __future__ import annotations

import json
import re

from .blocks import Blocks
from .syntax import ParsedCall, Parts, Syntax, Tools, json_of

BEGIN, END, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
CALL = re.compile(r"\s*call:\s*([^\s{]+)\s*(\{.*\})\s*", re.S)
KEY = re.compile(r"([{,]\s*)([^\s{}\[\],:\"]+)\s*:")


def _parse(text: str) -> list[ParsedCall] | None:
    call = CALL.fullmatch(text)
    if call is None:
        return None
    pieces = call[2].split(QUOTE)  # every second one is a text
    written = [json.dumps(p) if index % 2 else KEY.sub(r'\1"\2":', p) for index, p in enumerate(pieces)]
    arguments = json_of("".join(written))
    return [ParsedCall(call[1], arguments)] if isinstance(arguments, dict) else None


def _parts(tools: Tools) -> Parts:
    return Blocks([BEGIN], [END], _parse)


def _writes(template: str) -> bool:
    return BEGIN in template and "call:" in template


GEMMA = Syntax("gemma", (BEGIN, END, QUOTE), _writes, _parts)
