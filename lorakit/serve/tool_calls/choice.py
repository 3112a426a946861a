"""`tools` and `tool_choice` of a request, checked: which tools the prompt shows, and whether a call is demanded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import DataError, did_you_mean
from .forced import forced_schema, named
from .syntax import Tools

NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")  # OpenAI: 64 letters without dots; names of MCP servers are longer
CHOICES = ("none", "auto", "required")
EXPECTED = 'expected none, auto, required or {"type": "function", "function": {"name": "..."}}'


@dataclass(frozen=True)
class ToolRequest:
    """tools: those that the prompt shows; none with tool_choice "none". schema: what the answer must be, if a call is
    demanded.
    """

    tools: Tools = ()
    schema: str | None = None


def tool_request(tools: object, tool_choice: object = None, parallel: bool = True) -> ToolRequest:
    """Check a request's tools. tool_choice: None is "auto". Raises DataError."""
    found = _tools(tools)
    if isinstance(tool_choice, Mapping):
        return _named(found, tool_choice, parallel)
    if tool_choice is not None and tool_choice not in CHOICES:
        hint = did_you_mean(tool_choice, CHOICES) if isinstance(tool_choice, str) else ""
        raise DataError(f"tool_choice is {tool_choice!r}; {EXPECTED}{hint}")
    if tool_choice == "none":
        return ToolRequest()
    if tool_choice != "required":
        return ToolRequest(found)
    if not found:
        raise DataError("tool_choice is 'required', but the request has no tools")
    return ToolRequest(found, forced_schema(found, parallel))


def _named(tools: Tools, choice: Mapping[str, Any], parallel: bool) -> ToolRequest:
    """{"type": "function", ...}, or {"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}."""
    kind = choice.get("type")
    if kind == "allowed_tools":
        allowed = choice.get("allowed_tools")
        if not isinstance(allowed, Mapping) or allowed.get("mode") not in ("auto", "required"):
            raise DataError("tool_choice.allowed_tools is expected to have mode (auto or required) and tools")
        given = allowed.get("tools")
        names = [_name(each, tools, "tool_choice.allowed_tools") for each in given] if isinstance(given, list) else []
        kept = named(tools, names)
        return tool_request(kept, allowed["mode"], parallel)
    if kind != "function":
        raise DataError(f"tool_choice.type is {kind!r}; {EXPECTED}")
    kept = named(tools, [_name(choice, tools, "tool_choice")])
    return ToolRequest(tools, forced_schema(kept, parallel=False))


def _name(choice: object, tools: Tools, key: str) -> str:
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    known = [str(tool["function"]["name"]) for tool in tools]
    if not isinstance(name, str) or name not in known:
        hint = did_you_mean(name, known) if isinstance(name, str) else ""
        raise DataError(f"{key} names the function {name!r}, which is none of tools{hint}")
    return name


def _tools(tools: object) -> list[dict[str, Any]]:
    if tools is None:
        return []
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise DataError(f"tools is a {type(tools).__name__}; expected a list of functions")
    found = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    names = [tool["function"]["name"] for tool in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"tools has two functions named '{twice}'")
    return found


def _tool(tool: object, key: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise DataError(f"{key} is a {type(tool).__name__}; expected an object")
    if tool.get("type", "function") != "function":
        raise DataError(f"{key}.type is {tool.get('type')!r}; this server knows tools of type function only")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise DataError(f"{key}.function is missing; expected an object with name, description and parameters")
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise DataError(f"{key}.function.name is {name!r}; expected up to 128 of the characters a-z A-Z 0-9 _ - .")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise DataError(f"{key}.function.parameters is a {type(parameters).__name__}; expected a JSON schema")
    if parameters and parameters.get("type", "object") != "object":
        raise DataError(f"{key}.function.parameters.type is {parameters['type']!r}; a function's is object")
    kept = {name: value for name, value in function.items() if value is not None}
    return {"type": "function", "function": kept}
