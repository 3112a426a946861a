"""Errors as OpenAI's objects (`error_body`), with statuses by which its clients retry what can heal and nothing else.

The openai client asks again after 408, 409, 429 and 5xx, unless the answer says `x-should-retry: false`. So what the
caller must change is 400 or 404, never 409 or 422, and a failure that will not heal carries that header.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ...errors import (
    AdapterError,
    ConfigError,
    DataError,
    LorakitError,
    StateError,
    WriteError,
    choices,
    did_you_mean,
    expectation,
)
from ..error_body import error_body
from ..errors import Busy, Cannot, EngineFailed, Stopping, TooLong, UnknownAdapter, Unreachable
from .offered import missing
from .replies import Json

log = logging.getLogger("lorakit.serve")

# The request's field behind each ability that an engine may lack.
FIELDS = {"mix": "model", "scale": "lorakit.scale", "schema": "response_format", "repetition": "repetition_penalty"}
# Errors of the renderer and of names begin with the place in the request that is wrong, such as messages[2].content.
FIELD_AT_START = re.compile(
    r"(messages|prompt|tools|tool_choice|response_format|chat_template_kwargs)\b[\w.$\[\]]*|model(?=:)|lorakit\.scale\b"
)
NO_RETRY = {"x-should-retry": "false"}
SHOWN = 60  # characters of a wrong value in a message


class ApiError(LorakitError):
    """A request that cannot be answered. `param`: the field to change; `code`: what a program can branch on."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class TimedOut(LorakitError):
    """The request's time was over before its answer was."""


INTERNAL = error_body("the server failed; its log says why", 500, None, "internal_error")


def described(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return status, body and headers for an error. What is not an error of the caller's is logged, and not shown."""
    text = str(error)
    match error:
        case ApiError():
            return error.status, error_body(text, error.status, error.param, error.code), {}
        case UnknownAdapter():
            return 404, error_body(text, 404, "model", "model_not_found"), {}
        case TooLong():
            return 400, error_body(text, 400, None, "context_length_exceeded"), {}
        case Cannot():
            return 400, error_body(text, 400, FIELDS.get(error.what, error.what), "unsupported"), {}
        case Stopping():
            return 503, error_body(text, 503, None, "stopping"), _after(error.retry_after)
        case Busy():
            return 429, error_body(text, 429, None, "overloaded"), _after(error.retry_after)
        case TimedOut():
            return 504, error_body(text, 504, None, "timeout"), NO_RETRY
        case EngineFailed():
            status = 500 if error.heals else 503
            return status, error_body(text, status, None, "engine_failed"), {} if error.heals else NO_RETRY
        case Unreachable():
            return 503, error_body(text, 503, None, "unreachable"), _after(error.retry_after)
        case AdapterError():
            return 400, error_body(text, 400, "model", "adapter_refused"), {}
        case ConfigError() | DataError() | StateError():
            field = FIELD_AT_START.match(text)
            return 400, error_body(text, 400, field and field[0]), {}
        case WriteError():  # its text names a path of this machine, which is for the operator
            log.error("%s", text)
            return 503, error_body("the server cannot write to its disk; its log says why", 503, None, "disk"), NO_RETRY
    log.error("a request failed", exc_info=error)
    return 500, INTERNAL, NO_RETRY


def _after(seconds: float) -> dict[str, str]:
    """Return the headers that say when to ask again. OpenAI's clients read the second, others the first."""
    wait = max(seconds, 0.05)
    return {"retry-after": str(math.ceil(wait)), "retry-after-ms": str(math.ceil(wait * 1000))}


def response(error: Exception, headers: Mapping[str, str] | None = None) -> Response:
    """Return an error's response."""
    status, content, own = described(error)
    return Json(content, status, {**own, **(headers or {})})


def install(app: FastAPI) -> None:
    """Make every error of the app, also FastAPI's own, one of these objects."""

    async def failed(_: Request, error: Exception) -> Response:
        return response(error)

    async def broken(_: Request, error: Exception) -> Response:
        # Starlette raises it again, for the server to log.
        return Json(INTERNAL, 500, NO_RETRY)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return response(validation(error.errors(), error.body))

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return response(_of_http(request, error), error.headers)

    app.add_exception_handler(LorakitError, failed)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(Exception, broken)


def _of_http(request: Request, error: HTTPException) -> ApiError:
    path = request.url.path
    if error.status_code == 404:
        return ApiError(missing(path), code="not_found", status=404)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "POST")
        return ApiError(f"{path} answers {allowed}, not {request.method}", code="method_not_allowed", status=405)
    if error.status_code == 400:
        if isinstance(error.__cause__, RecursionError):
            return ApiError("the body is nested too deeply", code="nested_too_deep")
        return ApiError("the body is not JSON that can be read; expected JSON in UTF-8")
    return ApiError(str(error.detail), status=error.status_code)


def validation(problems: Sequence[Mapping[str, Any]], given: object) -> ApiError:
    """Turn pydantic's problems with a body into one error, which names the first field that is wrong."""
    if not problems:
        return ApiError("the request is not valid")
    first = problems[0]
    if first["type"] == "json_invalid":
        return ApiError(f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    if not isinstance(given, dict) and first["loc"] == ("body",):
        return ApiError('the body is not a JSON object; send one, with the header "content-type: application/json"')
    fields: dict[tuple[str | int, ...], list[Mapping[str, Any]]] = {}
    for problem in problems:
        fields.setdefault(tuple(_field(problem, given)), []).append(problem)
    # Of a union, the member whose problem lies deepest is the one that was meant.
    start = next(iter(fields))[:1]
    path, items = max((entry for entry in fields.items() if entry[0][:1] == start), key=lambda entry: len(entry[0]))
    param = ".".join(str(part) for part in path) or None
    if items[0]["type"] == "missing":
        return ApiError(f"{param} is missing", param)
    if items[0]["type"] == "extra_forbidden":
        return ApiError(f"{param} is not known", param)
    if items[0]["type"] in ("too_short", "too_long"):
        bounds = items[0]["ctx"]
        most = "at least" if "min_length" in bounds else "at most"
        bound, count = bounds.get("min_length", bounds.get("max_length")), bounds["actual_length"]
        return ApiError(f"{param}: expected {most} {bound} item{'' if bound == 1 else 's'}, not {count}", param)
    # A nested body is a model to pydantic, and an object to the caller.
    items = [{**item, "type": "dict_type"} if item["type"] == "model_attributes_type" else item for item in items]
    value = items[0].get("input")
    hint = did_you_mean(value, choices(items)) if isinstance(value, str) else ""
    shown = repr(value)
    shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…"
    return ApiError(f"{param or 'the request'}: {expectation(items)}, not {shown}{hint}", param)


def _field(problem: Mapping[str, Any], given: object) -> Iterator[str | int]:
    """Walk to a problem's field. pydantic also names which member of a union it tried: that is not part of the path."""
    parts = [part for part in problem["loc"] if part != "body"]
    for position, part in enumerate(parts):
        inside = isinstance(given, dict) and part in given
        within = isinstance(given, list) and isinstance(part, int) and part < len(given)
        if inside or within:
            given = cast(Any, given)[part]
            yield part
        elif problem["type"] == "missing" and position == len(parts) - 1:
            yield part
