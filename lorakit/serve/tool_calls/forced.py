"""tool_choice "required", or a function's name: the answer is held to a JSON schema, so that it must be a call.

    [{"name": "get_weather", "arguments": {"city": "Rome"}}, ...]

One form for every family. The model has read the tools in its own template, and the grammar does the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .blocks import Blocks
from .syntax import ParsedCall, Parts, Syntax, Tools, call_of, json_of

ANY_OBJECT = {"type": "object"}


def forced_schema(tools: Tools, parallel: bool = True) -> str:
    """Return the JSON schema, as text, of an answer that calls one or more of these tools. parallel: more than one."""
    items, definitions = [], {}
    for number, tool in enumerate(tools):
        function = tool["function"]
        parameters = function.get("parameters") or ANY_OBJECT
        arguments: Any = parameters
        if _has_references(parameters):
            # References are relative to the root of a schema, which is another one now.
            definitions[f"tool{number}"] = _moved(parameters, f"#/$defs/tool{number}")
            arguments = {"$ref": f"#/$defs/tool{number}"}
        items.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": items}}
    if not parallel:
        schema["maxItems"] = 1
    return json.dumps(schema | ({"$defs": definitions} if definitions else {}), ensure_ascii=False)


def _has_references(value: object) -> bool:
    if isinstance(value, Mapping):
        return "$ref" in value or any(map(_has_references, value.values()))
    return isinstance(value, list) and any(map(_has_references, value))


def _moved(value: Any, root: str) -> Any:
    """Return a schema whose references "#/..." point below another root."""
    if isinstance(value, Mapping):
        return {
            key: root + each[1:]
            if key == "$ref" and isinstance(each, str) and each.startswith("#")
            else _moved(each, root)
            for key, each in value.items()
        }
    return [_moved(each, root) for each in value] if isinstance(value, list) else value


def _parse(text: str) -> list[ParsedCall] | None:
    values = json_of(text)
    calls = [call_of(value) for value in values] if isinstance(values, list) else []
    return [call for call in calls if call is not None] if calls and None not in calls else None


def _parts(tools: Tools) -> Parts:
    return Blocks(["["], [], _parse, at_start=True, keep_begin=True)


def _writes(template: str) -> bool:
    return False  # asked for by tool_choice, not by a template


FORCED = Syntax("forced", (), _writes, _parts)


def named(tools: Tools, names: Sequence[str]) -> list[Mapping[str, Any]]:
    """Return the tools with these names, in the tools' order."""
    return [tool for tool in tools if tool["function"]["name"] in names]
