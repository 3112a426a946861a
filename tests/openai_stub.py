"""A small server that speaks OpenAI's API from a script, to test clients against: a peer of our own server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Stub:
    """`answer(path, body)` gives a text, or (status, headers, JSON) to refuse. `asked`: (path, body, headers)."""

    def __init__(self, answer: Callable[[str, dict[str, Any]], Any], models: list[dict[str, Any]]):
        self.answer, self.models = answer, models
        self.asked: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.break_stream_after: int | None = None
        self.url = ""


@contextmanager
def serving(answer: Callable[[str, dict[str, Any]], Any], models: list[dict[str, Any]] | None = None) -> Iterator[Stub]:
    """Run the server on a free port of loopback."""
    default = [{"id": "base", "object": "model"}, {"id": "sql", "object": "model", "parent": "base"}]
    stub = Stub(answer, default if models is None else models)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Print nothing."""

        def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"content-length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            stub.asked.append((self.path, {}, dict(self.headers)))
            listed = {"object": "list", "data": stub.models}
            if self.path == "/v1/models":
                self.send(200, json.dumps(listed).encode())
            else:
                self.send(404, b"<html>not here</html>")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            stub.asked.append((self.path, body, dict(self.headers)))
            answered = stub.answer(self.path, body)
            if isinstance(answered, tuple):
                status, headers, value = answered
                self.send(status, json.dumps(value).encode(), headers)
                return
            chat = self.path.endswith("/chat/completions")
            if not body.get("stream"):
                said = {"message": {"role": "assistant", "content": answered}} if chat else {"text": answered}
                choice = {"index": 0, "finish_reason": "stop", **said}
                self.send(200, json.dumps({"id": "1", "choices": [choice]}).encode())
                return
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            for n, word in enumerate(answered.split(" ")):
                if stub.break_stream_after == n:
                    return
                piece = f"{' ' if n else ''}{word}"
                choice = {"index": 0, **({"delta": {"content": piece}} if chat else {"text": piece})}
                self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
