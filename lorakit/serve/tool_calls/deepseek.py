"""Calls of DeepSeek: V3 and R1 name a type and quote JSON as Markdown does; V3.1 does neither.

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather
```json
{"city": "Rome"}
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Rome"}<｜tool▁call▁end｜>...
"""

from __future__ import annotations

from .blocks import Blocks
from .syntax import ParsedCall, Parts, Syntax, Tools, json_of

BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END, SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
FENCE = "```"


def _call(text: str) -> ParsedCall | None:
    before, separator, after = text.partition(SEPARATOR)
    fenced, fence, arguments = after.partition(FENCE)
    quoted = arguments.rstrip()
    if fence and len(fenced.split()) == 1 and quoted.endswith(FENCE):
        name, arguments = fenced.strip(), quoted.removesuffix(FENCE).removeprefix("json")
    else:
        name, arguments = before.strip(), after
    value = json_of(arguments)
    return ParsedCall(name, value) if separator and name and isinstance(value, dict) else None


def _parse(text: str) -> list[ParsedCall] | None:
    pieces = [each.strip().removesuffix(CALL_END) for each in text.strip().removesuffix(END).split(CALL)]
    calls = [_call(piece) for piece in pieces[1:]]
    if pieces[0].strip() or not calls or None in calls:
        return None
    return [call for call in calls if call is not None]


def _parts(tools: Tools) -> Parts:
    return Blocks([BEGIN], [END], _parse)


def _writes(template: str) -> bool:
    return BEGIN in template


DEEPSEEK = Syntax("deepseek", (BEGIN, END, CALL, CALL_END, SEPARATOR), _writes, _parts)
