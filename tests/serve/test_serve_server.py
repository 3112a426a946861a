"""The server's process: it says when it is ready, drains when it is stopped, and takes no longer than its bound."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest
import uvicorn
from asgi_calls import echo

from lorakit.errors import ConfigError
from lorakit.serve import connections
from lorakit.serve.server import HEADER_BYTES, _server, is_loopback, listen, url_of

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are sent as Unix does")
ROOT = Path(__file__).parent.parent.parent


class Process:
    def __init__(self, *args: str):
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "served.py"), *args],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.first = self.process.stdout.readline().strip()

    def stop(self, number: int, times: int = 1) -> tuple[int, str, float]:
        """Send the signal. Return the exit code, what was printed, and the seconds it took."""
        began = time.monotonic()
        for _ in range(times):
            self.process.send_signal(number)
            time.sleep(0.2)
        out, err = self.process.communicate(timeout=30)
        assert "Traceback" not in err, err
        return self.process.returncode, out.strip(), time.monotonic() - began


@pytest.fixture
def process():
    running: list[Process] = []

    def run(*args: str) -> Process:
        running.append(Process(*args))
        return running[-1]

    yield run
    for one in running:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


def in_thread(url: str, got: list[bytes]) -> threading.Thread:
    def read() -> None:
        with httpx2.stream("GET", url, timeout=30) as answer:
            try:
                for part in answer.iter_raw():
                    got.append(part)
            except httpx2.HTTPError as error:
                got.append(type(error).__name__.encode())

    thread = threading.Thread(target=read)
    thread.start()
    while not got:
        time.sleep(0.01)
    return thread


@contextlib.contextmanager
def running(protocol):
    """A server, or one with this class of connections, in a thread; yields its address."""
    server = protocol
    if isinstance(protocol, type):
        server = uvicorn.Server(uvicorn.Config(echo, http=protocol, lifespan="off", log_level="warning"))
    with listen("127.0.0.1", 0) as listener:
        address = listener.getsockname()
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield address
        finally:
            server.should_exit = True
            thread.join(10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_running_answers_are_drained_and_new_ones_refused(process, number):
    server, got = process("0", "0.6"), []
    assert httpx2.get(server.first).text == "ok"
    thread = in_thread(f"{server.first}/slow", got)
    server.process.send_signal(number)
    time.sleep(0.3)
    before = len(got)
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(server.first)
    thread.join()
    assert len(got) > before  # it went on while the server was stopping
    assert got[-1] == b"ok"  # to its end
    out, _ = server.process.communicate(timeout=30)
    assert out.split(" ")[:2] == [signal.Signals(number).name, "[0.6]"]


def test_an_answer_that_does_not_end_is_cut_after_the_bound(process):
    server, got = process("0", "0.2"), []
    thread = in_thread(f"{server.first}/stuck", got)
    code, _, seconds = server.stop(signal.SIGTERM)
    thread.join()
    assert code == 0
    assert seconds < 12  # 0.2 and 3 for what was cancelled, on a busy machine


def test_threads_that_hang_do_not_hold_up_the_end(process):
    """A download, or a file on a network disk: asyncio.run would wait for its threads, as long as they take."""
    server, got = process("0", "0.2"), []
    thread = in_thread(f"{server.first}/thread", got)
    code, out, seconds = server.stop(signal.SIGTERM)
    thread.join()
    assert (code, out.split(" ")[0]) == (0, "SIGTERM")
    assert seconds < 12


def test_a_thread_that_hangs_at_the_start_does_not_hold_up_the_end(process):
    server = process("0", "60", "hung")
    assert server.first == "starting"
    code, out, seconds = server.stop(signal.SIGINT)
    assert (code, out.split(" ")[:2]) == (0, ["SIGINT", "[]"])
    assert seconds < 12


def test_headers_are_bounded(process):
    server = process("0", "0.2")
    assert httpx2.get(server.first, headers={"x-long": "y" * (HEADER_BYTES // 2)}).text == "ok"
    with contextlib.suppress(httpx2.HTTPError):  # the connection may be closed while it still sends
        assert httpx2.get(server.first, headers={"x-long": "y" * (2 * HEADER_BYTES)}).status_code == 400
    assert httpx2.get(server.first).text == "ok"


def test_connections_are_bounded_and_those_beyond_are_refused(monkeypatch):
    monkeypatch.setattr("lorakit.serve.server.CONNECTIONS", 3)
    with running(_server(echo, 0.2)) as address, contextlib.ExitStack() as kept:
        for _ in range(2):
            kept.enter_context(socket.create_connection(address, 10))
        time.sleep(0.2)
        url = f"http://{address[0]}:{address[1]}"
        assert httpx2.get(url).status_code == 503  # it is the third
        kept.close()
        time.sleep(0.2)
        assert httpx2.get(url).status_code == 200


def test_a_second_signal_ends_it_at_once(process):
    server, got = process("0", "60"), []
    thread = in_thread(f"{server.first}/slow", got)
    code, _, seconds = server.stop(signal.SIGTERM, times=2)
    thread.join()
    assert code == 128 + signal.SIGTERM
    assert seconds < 5


def test_it_can_be_stopped_while_it_starts(process):
    server = process("0", "60", "slow")
    assert server.first == "starting"
    code, out, seconds = server.stop(signal.SIGTERM)
    assert (code, out.split(" ")[:2]) == (0, ["SIGTERM", "[]"])
    assert seconds < 5


def test_a_client_that_does_not_read_holds_up_nobody(process):
    server = process("0", "0.2")
    host, port = server.first.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as silent:
        silent.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(0.3)
        assert httpx2.get(server.first).text == "ok"
        code, _, seconds = server.stop(signal.SIGTERM)
    assert code == 0
    assert seconds < 12


def test_a_taken_port_is_an_error_that_names_another_one():
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"127.0.0.1:{port} cannot be used: Address already in use\n  try --port"
        ):
            listen("127.0.0.1", port)


def test_an_address_that_is_not_here_is_named():
    with pytest.raises(ConfigError, match=r"no.such.host.invalid: there is no such address"):
        listen("no.such.host.invalid", 0)
    with pytest.raises(ConfigError, match=r"203.0.113.7:0 cannot be used"):
        listen("203.0.113.7", 0)


@pytest.mark.parametrize(
    "host, loopback", [("127.0.0.1", True), ("localhost", True), ("127.9.9.9", True), ("0.0.0.0", False)]
)
def test_an_address_is_loopback_if_only_this_machine_reaches_it(host, loopback):
    with listen(host, 0) as listener:
        assert is_loopback(listener) is loopback
        assert url_of(listener).startswith("http://127." if host != "localhost" else "http://")


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ", b"GET / HTTP/1.1\r\nHost: h\r\n\r\nG"]
)
def test_connections_on_which_no_request_arrives_are_closed(monkeypatch, sent):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.2)
    with running(connections.Connection) as address, socket.create_connection(address, 10) as silent:
        silent.sendall(sent)
        began = time.monotonic()
        while silent.recv(1000):  # until it is closed: b""
            pass
        assert time.monotonic() - began < 5


def test_a_connection_that_is_used_stays_open(monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.8)
    with running(connections.Connection) as address:
        used = http.client.HTTPConnection(*address[:2], timeout=10)
        used.connect()
        used.auto_open = 0  # an error rather than a new connection
        for _ in range(10):
            used.request("GET", "/")
            assert used.getresponse().read() == b""
            time.sleep(0.2)
        used.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux has it")
def test_the_system_closes_connections_of_clients_that_do_not_read():
    with listen("127.0.0.1", 0) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
