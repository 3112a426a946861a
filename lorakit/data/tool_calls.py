"""Tool calls and tool descriptions in the forms that data has them, brought to the one that chat templates read.

    tool_calls: [{"type": "function", "function": {"name": ..., "arguments": {...}}}]        on an assistant turn
    tools:      [{"type": "function", "function": {"name": ..., "parameters": {...}}}]       of a row

Read as that: OpenAI's older `function_call` key, calls without their "function" level, a ShareGPT turn whose text is
the call as JSON, and each of these lists as JSON text. Arguments stay as given (an object, or JSON text); which of the
two a template takes, `template_forms` finds out.
"""

from __future__ import annotations

import json
from typing import Any

from lorakit.data.parse import Row
from lorakit.errors import DataError


def loaded(text: str, key: str, row: Row) -> Any:
    """Return a value given as JSON text. Raises DataError, naming `key`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{row.where}: {key}, column {error.colno}: broken JSON: {error.msg}") from error


def of_text(content: object) -> list[dict[str, Any]] | None:
    """Return the calls of a turn whose text is a call as JSON, or a list of calls; None if it is not."""
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except json.JSONDecodeError:
            return None
    calls = content if isinstance(content, list) else [content]
    found = [_wrapped(call) for call in calls]
    return [call for call in found if call is not None] if calls and None not in found else None


def checked(values: dict[str, Any], role: str, key: str, row: Row) -> dict[str, Any]:
    """Return a turn's further keys with its calls in the common form. Raises DataError for what is no call."""
    values = dict(values)
    if role == "assistant" and isinstance(values.get("function_call"), dict | str) and "tool_calls" not in values:
        values["tool_calls"] = [values.pop("function_call")]
        key = f"{key}.function_call"
    calls = values.get("tool_calls")
    if calls is None:
        return values
    if isinstance(calls, str):
        calls = loaded(calls, f"{key}.tool_calls", row) if calls.strip() else []
    if not isinstance(calls, list):
        raise DataError(f"{row.where}: {key}.tool_calls is expected to be a list, not {type(calls).__name__}")
    if not calls:
        del values["tool_calls"]
        return values
    values["tool_calls"] = [_call(call, f"{key}.tool_calls[{index}]", row) for index, call in enumerate(calls)]
    return values


def _call(call: object, key: str, row: Row) -> dict[str, Any]:
    call = loaded(call, key, row) if isinstance(call, str) else call
    wrapped = _wrapped(call)
    if wrapped is None:
        raise DataError(
            f'{row.where}: {key} is no call\n  expected {{"type": "function", "function": {{"name": ..., "arguments": '
            "...}}"
        )
    return wrapped


def _wrapped(call: object) -> dict[str, Any] | None:
    """Return a call with its "function" level and its arguments, None if it names no function."""
    if not isinstance(call, dict):
        return None
    call = {name: value for name, value in call.items() if value is not None}
    function = call.get("function")
    if not isinstance(function, dict):
        function = {name: value for name, value in call.items() if name not in ("id", "type", "index")}
        call = {name: value for name, value in call.items() if name not in function}
    function = {name: value for name, value in function.items() if value is not None}
    if not isinstance(function.get("name"), str):
        return None
    if "arguments" not in function:
        function["arguments"] = function.pop("parameters", {})
    return ({} if "type" in call else {"type": "function"}) | call | {"function": function}


def tools(value: object, row: Row, column: str = "tools") -> tuple[dict[str, Any], ...]:
    """Return the tool descriptions of a row, given as a list or as JSON text. Raises DataError."""
    return tuple(objects(value, row, column))


def objects(value: object, row: Row, column: str) -> list[dict[str, Any]]:
    """Return a column that holds a list of objects, or one of them, or either as JSON text. Raises DataError."""
    if isinstance(value, str):
        value = loaded(value, column, row) if value.strip() else []
    value = [] if value is None else value
    found = []
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, str) and each.lstrip().startswith("{"):
            each = loaded(each, column, row)
        if not isinstance(each, dict):
            what = f"has {type(each).__name__} {str(each)[:40]!r}" if isinstance(value, list) else f"is {value!r}"
            raise DataError(
                f"{row.where}: {column} is expected to be a list of objects, or such a list as JSON text, but {what}"
            )
        found.append(each)
    return found


def mapping(value: object, row: Row, column: str) -> dict[str, Any]:
    """Return a column that holds an object, or one as JSON text. Raises DataError."""
    if isinstance(value, str):
        value = loaded(value, column, row) if value.strip() else {}
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise DataError(f"{row.where}: {column} is expected to be an object, or one as JSON text")
    return {name: each for name, each in value.items() if each is not None}
