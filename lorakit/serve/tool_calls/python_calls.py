"""Calls as Python writes them: LFM 2.

    <|tool_call_start|>[get_weather(city="Rome", days=3)]<|tool_call_end|>

Parsed as a syntax tree; nothing of it is run.
"""

from __future__ import annotations

import ast
import math
import re
from typing import Any

from .blocks import Blocks
from .syntax import ParsedCall, Parts, Syntax, Tools

# A text that is not closed reaches to the end: looked for at each of its quotes, it would take quadratic time.
STRING = re.compile(r"'(?:\\.|[^'\\])*+(?:'|\Z)|\"(?:\\.|[^\"\\])*+(?:\"|\Z)", re.S)
INTEGER_BITS = 4_096  # hexadecimal ones have no bound in Python, and long ones cannot be written in decimal
NAMES = {"true": True, "false": False, "null": None}  # JSON's, as templates write arguments
BEGIN, END = "<|tool_call_start|>", "<|tool_call_end|>"


def _tree(text: str) -> ast.expr | None:
    # The models' templates write line ends in texts as they are, which Python does not allow.
    text = STRING.sub(lambda string: string[0].replace("\n", "\\n"), text.strip())
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Any:
    """Return the value of a literal. Raises ValueError for anything else."""
    if isinstance(node, ast.Name) and node.id in NAMES:
        return NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(each) for each in node.elts]
    if isinstance(node, ast.Dict):
        keys = [None if key is None else _value(key) for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise ValueError("keys are texts")
        return dict(zip(keys, map(_value, node.values), strict=True))
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | bool | None):
        raise ValueError(f"a {type(value).__name__} is not JSON")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("JSON has finite numbers only")
    if isinstance(value, int) and value.bit_length() > INTEGER_BITS:
        raise ValueError("a number of that length cannot be written")
    return value


def _parsed_call(node: ast.expr) -> ParsedCall | None:
    if not isinstance(node, ast.Call) or node.args:
        return None
    try:
        name = ast.unparse(node.func)
        return ParsedCall(name, {str(k.arg): _value(k.value) for k in node.keywords if k.arg is not None})
    except (ValueError, TypeError, RecursionError):
        return None


def arguments_of(text: str) -> dict[str, Any] | None:
    """Return the keyword arguments of one call, None if it is not one."""
    node = _tree(text)
    call = None if node is None else _parsed_call(node)
    return None if call is None else dict(call.arguments)


def _parse(text: str) -> list[ParsedCall] | None:
    node = _tree(text)
    nodes = node.elts if isinstance(node, ast.List) else [] if node is None else [node]
    calls = [_parsed_call(each) for each in nodes]
    return [call for call in calls if call is not None] if calls and None not in calls else None


def _parts(tools: Tools) -> Parts:
    return Blocks([BEGIN], [END], _parse)


def _writes(template: str) -> bool:
    return BEGIN in template


PYTHON_CALLS = Syntax("python-calls", (BEGIN, END), _writes, _parts)
