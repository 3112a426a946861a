"""The log: a line for each request, which no request can forge, and without what was asked."""

from __future__ import annotations

import io
import logging

import pytest
from asgi_calls import call, echo

from lorakit.serve import logs
from lorakit.serve.guard.guarded import GuardSettings, guarded
from lorakit.serve.guard.keys import Keys
from lorakit.serve.guard.shield import Broken
from lorakit.serve.observe import observed

KEY = "use-0123456789abcdef"


@pytest.fixture
def log():
    stream = io.StringIO()
    loggers = (logs.LOG, logging.getLogger("uvicorn.error"))
    before = [(one.handlers[:], one.level, one.propagate) for one in loggers]
    logs.configure(stream=stream)
    yield stream
    for one, (handlers, level, propagate) in zip(loggers, before, strict=True):
        one.handlers[:], one.level, one.propagate = handlers, level, propagate


def app():
    return observed(guarded(echo, GuardSettings(keys=Keys((KEY,))), logs.report), [logs.access_line])


def test_a_request_is_a_line_without_prompt_and_key(log):
    headers = {"authorization": f"Bearer {KEY}"}
    answer = call(app(), "/v1/completions", "POST", headers, [b'{"prompt": "my secret"}'])
    call(app(), "/v1/completions", "POST", {"authorization": "Bearer wrong-key"})
    first, second = log.getvalue().splitlines()
    assert '127.0.0.1 "POST /v1/completions" 200 ' in first
    assert answer.headers["x-request-id"] in first
    assert " 401 " in second
    for word in ("secret", KEY, "wrong-key", "Bearer"):
        assert word not in log.getvalue()


def test_a_path_cannot_forge_a_line_nor_fill_the_log(log):
    call(app(), '/a\n2026-01-01T00:00:00Z 1.2.3.4 "GET /forged" 200\x1b[31m\u2028' + "x" * 5_000)
    assert len(log.getvalue().splitlines()) == 1
    assert "\x1b" not in log.getvalue()
    assert len(log.getvalue()) < 600


def test_an_error_is_logged_with_its_lines_of_code_and_without_its_text(log):
    try:
        raise ValueError("the text of a prompt")
    except ValueError as error:
        logs.report("req-1", error)
        logging.getLogger("lorakit.serve.api").error("a request failed", exc_info=error)
    assert "req-1 failed\n" in log.getvalue()
    assert log.getvalue().count("ValueError\n") == 2
    assert log.getvalue().count("test_serve_logs.py") == 2
    assert "prompt" not in log.getvalue().replace('raise ValueError("the text of a prompt")', "")


def test_warnings_of_the_http_server_are_shown_and_broken_answers_are_not_shown_twice(log):
    uvicorn = logging.getLogger("uvicorn.error")
    uvicorn.warning("Invalid HTTP request received.")
    uvicorn.info("Started")
    try:
        raise Broken("req-1")
    except Broken as error:
        uvicorn.error("Exception in ASGI application\n", exc_info=error)
    assert [line.split(" ", 1)[1] for line in log.getvalue().splitlines()] == ["Invalid HTTP request received."]


def test_the_access_log_can_be_switched_off(log):
    logs.configure(access=False, stream=log)
    call(app())
    assert log.getvalue() == ""
    logs.report("req-1", ValueError("x"))
    assert "req-1 failed\nValueError" in log.getvalue()
