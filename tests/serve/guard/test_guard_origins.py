"""Pages of others cannot change anything, and read nothing unless their origin was named."""

from __future__ import annotations

import pytest
from asgi_calls import call, echo

from lorakit.errors import ConfigError
from lorakit.serve.guard.origins import only_origins, origin_names

PATH = "/v1/chat/completions"


def post(origins, origin, **more):
    return call(only_origins(echo, origin_names(origins)), PATH, "POST", {"origin": origin}, **more)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:3000", "https://localhost", "x"])
def test_a_foreign_page_cannot_post(origin):
    answer = post([], origin)
    assert (answer.status, answer.code, answer.reads) == (403, "origin_not_allowed", 0)
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_foreign_page_that_gets_something_cannot_read_it():
    answer = call(only_origins(echo, frozenset()), "/v1/models", "GET", {"origin": "http://evil.example"})
    assert answer.status == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_programs_and_the_servers_own_pages_may_post():
    assert call(only_origins(echo, frozenset()), PATH, "POST").status == 200
    assert post([], "http://localhost:8000").status == 200
    assert post([], "https://localhost:8000").status == 200  # behind a proxy that ends TLS


def test_a_named_origin_may_call_and_read_also_what_went_wrong():
    async def refusing(scope, receive, send):
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    for app in (echo, refusing):
        answer = call(only_origins(app, origin_names(["http://ui.test/"])), PATH, "POST", {"origin": "http://ui.test"})
        assert answer.headers["access-control-allow-origin"] == "http://ui.test"
        assert answer.headers["vary"] == "Origin"
        assert "access-control-allow-credentials" not in answer.headers
    assert post(["http://ui.test"], "http://ui.test:81").status == 403
    assert post(["http://ui.test"], "http://ui.test.evil.example").status == 403


def test_preflights_are_answered_for_named_origins_alone():
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}
    app = only_origins(echo, origin_names(["http://ui.test"]))
    answer = call(app, PATH, "OPTIONS", {"origin": "http://ui.test", **asked})
    assert (answer.status, answer.headers["access-control-allow-headers"]) == (204, "authorization,x-stainless-os")
    assert call(app, PATH, "OPTIONS", {"origin": "http://evil.example", **asked}).status == 403
    odd = {**asked, "access-control-request-headers": "a\x7f\xe9: b"}
    answer = call(app, PATH, "OPTIONS", {"origin": "http://ui.test", **odd})
    assert answer.headers["access-control-allow-headers"] == "authorization, content-type"


@pytest.mark.parametrize("name", ["ui.test", "http://ui.test/path", "http://", "null", "", "*.test"])
def test_what_is_no_origin_is_an_error_of_the_command(name):
    with pytest.raises(ConfigError, match="expected scheme, host and port"):
        origin_names([name])
