"""What breaks is answered without details, has an id, and is in the log; all guards together keep their order."""

from __future__ import annotations

import asyncio

import pytest
from asgi_calls import call, echo

from lorakit.serve.guard.guarded import GuardSettings, bounded_crowd, guarded
from lorakit.serve.guard.keys import Keys
from lorakit.serve.guard.limits import Limits
from lorakit.serve.guard.shield import Broken, shielded

SECRET = "the text of a prompt"


async def breaking(scope, receive, send):
    raise ValueError(SECRET)


async def breaking_later(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"half", "more_body": True})
    raise ValueError(SECRET)


def reported(app):
    seen = []
    answer = call(shielded(app, lambda name, error: seen.append((name, error)), 0.05))
    return answer, seen


def test_an_error_is_answered_without_its_text_and_under_an_id_that_the_log_has():
    answer, seen = reported(breaking)
    assert (answer.status, answer.code) == (500, "internal_error")
    assert SECRET not in answer.body.decode()
    assert "Traceback" not in answer.body.decode()
    [(name, error)] = seen
    assert isinstance(error, ValueError)
    assert name in answer.message
    assert answer.headers["x-request-id"] == name


def test_an_answer_that_breaks_in_the_middle_does_not_look_complete():
    answer, seen = reported(breaking_later)
    assert answer.body == b"half"
    assert isinstance(answer.error, Broken)  # upon which the server closes the connection
    assert len(seen) == 1


def test_a_client_that_takes_nothing_is_given_up():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def stuck(message):
        await asyncio.sleep(60)

    async def run():
        scope = {"type": "http", "headers": []}
        await shielded(app, lambda *_: pytest.fail("not an error of ours"), 0.05)(scope, None, stuck)

    with pytest.raises(Broken):
        asyncio.run(run())


def test_every_answer_has_an_id_and_is_not_sniffed():
    answer, _ = reported(echo)
    other, _ = reported(echo)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-request-id"].startswith("req-")
    assert answer.headers["x-request-id"] != other.headers["x-request-id"]


def test_guards_stand_in_order_and_all_answer_with_openais_errors():
    keys = Keys(("use-0123456789abcdef",))
    app = guarded(breaking, GuardSettings(keys=keys, limits=Limits(body=10)), lambda *_: None)
    right = {"authorization": "Bearer use-0123456789abcdef"}
    page = {"origin": "http://evil.example"}
    assert call(app, host="evil.example", headers=page).status == 400  # before the origin
    assert call(app, method="POST", headers=page).status == 403  # before the key
    assert call(app, method="POST", parts=[b"x" * 99]).status == 401  # before the body
    assert call(app, method="POST", headers=right, parts=[b"x" * 99]).status == 413  # before the application
    assert call(app, method="POST", headers=right).status == 500
    for answer in (call(app, host="evil.example"), call(app)):
        assert "x-request-id" in answer.headers


def test_what_is_under_way_is_bounded_and_probes_are_still_answered():
    async def run():
        release = asyncio.Event()

        async def waiting(scope, receive, send):
            await release.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        app, statuses = bounded_crowd(waiting, 2), []

        async def ask(path):
            async def send(message):
                if message["type"] == "http.response.start":
                    statuses.append((path, message["status"], dict(message["headers"]).get(b"retry-after")))

            await app({"type": "http", "path": path, "headers": []}, None, send)

        tasks = [asyncio.create_task(ask(path)) for path in ("/a", "/b", "/c", "/health")]
        await asyncio.sleep(0.01)
        assert statuses == [("/c", 429, b"1")]
        release.set()
        await asyncio.gather(*tasks)
        await ask("/d")  # places are given back
        assert sorted(statuses) == [("/a", 200, None), ("/b", 200, None), ("/c", 429, b"1"), ("/d", 200, None),
                                    ("/health", 200, None)]  # fmt: skip

    asyncio.run(run())
