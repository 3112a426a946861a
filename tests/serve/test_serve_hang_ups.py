"""A client that goes away gives its slot back at once, streamed or not, waiting or answering."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from typing import Any

import pytest
from served_app import ASK, Exchange, ids, live, served

from lorakit.serve.engine import Work
from lorakit.serve.guard.limits import Limits

SQL = {**ASK, "model": "sql"}


def endless(work: Work) -> list[int]:
    return ids("x" * 400)


async def until(condition: Any, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    "path, body", [("/v1/chat/completions", SQL), ("/v1/completions", {"model": "sql", "prompt": "a"})]
)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_hang_up_cancels_all_answers_of_the_request(path: str, body: Any, stream: bool, n: int):
    async def hang_up_while_it_waits() -> None:
        app = served(endless)
        app.engine.hold = asyncio.Event()
        exchange = Exchange(app.app, path, {**body, "stream": stream, "n": n, "max_tokens": 400})
        request = asyncio.create_task(exchange.run())
        await until(lambda: len(app.engine.works) == n)
        assert app.leased == 1
        exchange.hang_up()
        await request
        await until(lambda: app.engine.cancelled == n)
        assert app.leased == 0
        assert exchange.sent == []

    asyncio.run(hang_up_while_it_waits())


@pytest.mark.parametrize("n", [1, 2])
def test_a_hang_up_in_the_middle_of_a_stream_stops_within_a_token(n: int):
    async def hang_up_while_it_answers() -> None:
        app = served(endless)
        app.engine.hold = asyncio.Event()
        app.engine.hold.set()
        exchange = Exchange(app.app, "/v1/chat/completions", {**SQL, "stream": True, "n": n, "max_tokens": 400})
        request = asyncio.create_task(exchange.run())
        await exchange.arrived.wait()
        app.engine.hold.clear()
        exchange.hang_up()
        await request
        await until(lambda: app.engine.cancelled == n)
        assert app.leased == 0
        assert app.engine.stats().running == 0

    asyncio.run(hang_up_while_it_answers())


def test_a_client_that_does_not_read_holds_back_its_stream_until_it_is_cancelled():
    """The server's `send` waits, pieces pile up in the ticket, and at its bound the request is cancelled."""

    async def never_reads() -> None:
        app = served(lambda work: ids("x" * 2000), context=4000)
        stuck = asyncio.Event()
        exchange = Exchange(app.app, "/v1/chat/completions", {**SQL, "stream": True})

        async def send(message: dict[str, Any]) -> None:
            exchange.sent.append(message)
            if len(exchange.sent) > 3:
                await stuck.wait()

        exchange._send = send  # type: ignore[method-assign]
        request = asyncio.create_task(exchange.run())
        await until(lambda: app.engine.cancelled == 1)
        assert app.engine._answered < 1000
        stuck.set()
        await request
        assert b"event: error" in exchange.sent[-1]["body"]
        assert app.leased == 0

    asyncio.run(never_reads())


@pytest.mark.parametrize(
    "path, body", [("/v1/chat/completions", SQL), ("/v1/completions", {"model": "sql", "prompt": "a"})]
)
def test_a_write_that_fails_is_the_last_one(path: str, body: Any, caplog: Any):
    """A client that does not read is cut off after a minute (`guard.shield`), not after another for the error too."""

    class Broken(Exception):
        pass

    async def breaks() -> None:
        app = served(endless)
        exchange = Exchange(app.app, path, {**body, "stream": True, "max_tokens": 400})
        tried = []

        async def send(message: dict[str, Any]) -> None:
            tried.append(message["type"])
            if len(tried) == 3:
                raise Broken

        exchange._send = send  # type: ignore[method-assign]
        with pytest.raises(Broken):
            await exchange.run()
        assert tried == ["http.response.start", "http.response.body", "http.response.body"]
        assert (app.leased, app.engine.cancelled) == (0, 1)

    asyncio.run(breaks())
    assert "a request failed" not in caplog.text


def test_a_request_in_time_is_not_cancelled_by_the_end_of_its_connection():
    async def ask() -> None:
        app = served("Hello")
        exchange = Exchange(app.app, "/v1/chat/completions", ASK)
        await exchange.run()
        assert exchange.sent[0]["status"] == 200
        assert app.engine.cancelled == 0

    asyncio.run(ask())


def test_what_hangs_is_cut_off(monkeypatch: pytest.MonkeyPatch):
    """A disk that does not answer: 504. A client that does not read its answer's end: its adapter is given back."""
    monkeypatch.setattr("lorakit.serve.api.answering.GRACE", 0.05)

    async def hang() -> None:
        app = served("Hello", limits=Limits(seconds=0.1))
        for hanging in (True, False):
            exchange = Exchange(app.app, "/v1/chat/completions", {**SQL, "stream": True})
            if hanging:
                lease, app.registry.lease = app.registry.lease, never  # type: ignore[method-assign]
                await exchange.run()
                app.registry.lease = lease  # type: ignore[method-assign]
                assert exchange.sent[0]["status"] == 504
            else:
                exchange._send = lambda message: asyncio.sleep(60)  # type: ignore[method-assign]
                await exchange.run()
            assert app.leased == 0

    @contextlib.asynccontextmanager
    async def never(model: str, scale: Any) -> Any:
        await asyncio.sleep(60)
        yield

    asyncio.run(hang())


def test_a_socket_that_closes_cancels():
    app = served(lambda work: ids("x" * 100_000), context=200_000)
    with live(app.app) as url:
        host, port = url.removeprefix("http://").split(":")
        for stream in (b"true", b"false"):
            before = app.engine.cancelled
            body = b'{"model":"base","prompt":"a","max_tokens":100000,"stream":' + stream + b"}"
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
            with socket.create_connection((host, int(port))) as client:
                client.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
                if stream == b"true":
                    assert b"200 OK" in client.recv(200)
                else:
                    time.sleep(0.1)
            end = time.monotonic() + 5
            while app.engine.cancelled == before and time.monotonic() < end:
                time.sleep(0.01)
            assert app.engine.cancelled == before + 1
        assert app.leased == 0
