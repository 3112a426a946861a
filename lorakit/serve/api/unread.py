"""What a request asks for that nothing here reads: refused if it would change the answer, named in a header if not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel

from ...errors import nearest
from .errors import ApiError
from .offered import LABELS, REFUSED, is_asked

MOST_NAMED = 10  # in the header; the rest is counted
LONGEST_NAME = 80  # characters of a path in the header
# What may stand in a header as it is. Names of fields come from the request, and must not end the header.
PRINTABLE = "".join(chr(code) for code in range(32, 127) if chr(code) != "%")
FORMAT_KEYS = frozenset({"type", "json_schema"})
SCHEMA_KEYS = frozenset({"name", "schema", "strict", "description"})
TOOL_KEYS = frozenset({"type", "function"})
PART_KEYS = frozenset({"type", "text"})


def check_offered(extra: Mapping[str, Any] | None) -> None:
    """Raise ApiError for a field that would change the answer and is not done here."""
    extra = extra or {}
    for name, instead in REFUSED.items():
        if is_asked(extra.get(name)):
            raise ApiError(f"{name} is not served here: {instead}", name, "unsupported")
    modalities = extra.get("modalities")
    if is_asked(modalities) and modalities != ["text"]:
        raise ApiError('modalities: answers are text; expected ["text"]', "modalities", "unsupported")


def warning(request: BaseModel, notes: Sequence[str] = ()) -> dict[str, str]:
    """Return the header that says what of a valid request had no effect; none if all had. notes: further texts."""
    known, others = type(request).model_fields, request.model_extra or {}
    names = list(unread(request))
    shown = []
    for name in names[:MOST_NAMED]:
        close = nearest(name, known) if name in others and len(name) < 40 else None
        shown.append((name[:LONGEST_NAME].strip() or "''") + (f" (did you mean {close}?)" if close else ""))
    if len(names) > MOST_NAMED:
        shown.append(f"{len(names) - MOST_NAMED} more")
    texts = [*([f"not used: {', '.join(shown)}"] if shown else []), *notes]
    escaped = [quote(text, safe=PRINTABLE, errors="replace") for text in texts if text]
    return {"x-lorakit-warning": "; ".join(escaped)} if escaped else {}


def unread(request: BaseModel) -> Iterator[str]:
    """Yield the paths of a request's fields that are not read. Those that only label the request are not among them."""
    for name, value in (request.model_extra or {}).items():
        if name not in LABELS and value is not None and not (name in REFUSED and not is_asked(value)):
            yield name
    for name in type(request).model_fields:
        value = getattr(request, name)
        if isinstance(value, BaseModel):
            yield from (f"{name}.{key}" for key, one in (value.model_extra or {}).items() if is_asked(one))
    response_format = _field(request, "response_format")
    if response_format:
        yield from _others(response_format, FORMAT_KEYS, "response_format")
        yield from _others(response_format.get("json_schema"), SCHEMA_KEYS, "response_format.json_schema")
    # The keys of a message and of a function are for the chat template, which the renderer checks.
    for at, message in enumerate(_field(request, "messages") or ()):
        content = message.get("content")
        for nth, part in enumerate(content if isinstance(content, list) else ()):
            yield from _others(part, PART_KEYS, f"messages[{at}].content[{nth}]")
    by_schema = _field(request, "tool_choice") not in (None, "auto", "none")
    for at, tool in enumerate(_field(request, "tools") or ()):
        yield from _others(tool, TOOL_KEYS, f"tools[{at}]")
        function = tool.get("function")
        if isinstance(function, dict) and function.get("strict") is True and not by_schema:
            yield f"tools[{at}].function.strict"  # only a demanded call is held to the tool's schema


def _field(request: BaseModel, name: str) -> Any:
    """Return a field's value, None if this kind of request has no such field: an unknown key may have its name."""
    return getattr(request, name) if name in type(request).model_fields else None


def _others(value: object, known: frozenset[str], path: str) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (f"{path}.{key}" for key, one in value.items() if key not in known and is_asked(one))
