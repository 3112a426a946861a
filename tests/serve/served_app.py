"""The API over an engine that answers by script, and clients for it: in this process, or over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import openai
import tiny_lm
import uvicorn
from scripted_engine import ScriptedEngine
from served_adapters import write

from lorakit.serve.api.app import create_app
from lorakit.serve.engine import Work
from lorakit.serve.guard.limits import Limits
from lorakit.serve.guard.roots import Roots
from lorakit.serve.registry import Registry
from lorakit.serve.renderer import Renderer
from lorakit.serve.service import Service

# The tiny template, with tools and calls as Qwen's and Hermes' write them.
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HELLO = [{"role": "user", "content": "Hi"}]
ASK = {"model": "base", "messages": HELLO}


@cache
def tokenizer() -> Any:
    return tiny_lm.tokenizer(TEMPLATE)


def ids(text: str, end: bool = True) -> list[int]:
    """The ids of a text, a token a byte, and the end token."""
    return tokenizer().encode(text, add_special_tokens=False) + [tiny_lm.EOS] * end


@cache
def root() -> Path:
    """A folder with adapters by name; it is there until the tests end."""
    folder = Path(_FOLDER.name)
    for seed, name in enumerate(("sql", "chat", "team/sql", "other")):
        write(folder / name, seed)
    return folder


_FOLDER = tempfile.TemporaryDirectory()


@dataclass
class Served:
    """An app with what is behind it."""

    engine: ScriptedEngine
    registry: Registry
    service: Service
    app: Any = field(init=False)

    def __post_init__(self) -> None:
        self.app = create_app(self.service)

    @property
    def leased(self) -> int:
        """Requests that hold an adapter now, counted once for each."""
        return sum(card.running for card in self.registry.cards())

    def http(self) -> httpx2.AsyncClient:
        transport = httpx2.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1")

    def openai(self, retries: int = 0) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url="http://127.0.0.1/v1", api_key="none", http_client=self.http(), max_retries=retries
        )

    def post(self, path: str, body: Any) -> httpx2.Response:
        """Send a body, as JSON unless it is bytes, and return the answer."""

        async def send() -> httpx2.Response:
            async with self.http() as client:
                if isinstance(body, bytes):
                    return await client.post(path, content=body, headers={"content-type": "application/json"})
                return await client.post(path, json=body)

        return asyncio.run(send())

    def get(self, path: str) -> httpx2.Response:
        async def send() -> httpx2.Response:
            async with self.http() as client:
                return await client.get(path)

        return asyncio.run(send())

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the chunks of a stream; it must be whole, and end with [DONE]."""
        answer = self.post(path, {**body, "stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.text.endswith("data: [DONE]\n\n")
        events = answer.text.split("\n\n")[:-2]
        assert all(event.startswith("data: {") for event in events)
        return [json.loads(event.removeprefix("data: ")) for event in events]


def served(
    answer: str | Callable[[Work], Sequence[int]] = "Hello!",
    adapters: Sequence[str] = ("sql", "chat"),
    limits: Limits | None = None,
    context: int = 1024,
) -> Served:
    """Return the app over an engine that answers with a text, or as a function says."""
    engine = ScriptedEngine((lambda work: ids(answer)) if isinstance(answer, str) else answer, context, 258)
    registry = Registry(engine, engine.facts, base_names=["base"], roots=Roots([root()]))
    for name in adapters:
        registry.add(name, root() / name)
    renderer = Renderer(tokenizer(), (tiny_lm.EOS,))
    return Served(engine, registry, Service(engine, engine.facts, registry, renderer, limits or Limits()))


@contextlib.contextmanager
def live(app: Any) -> Iterator[str]:
    """Serve an app on a free port of this machine, in a thread; yield its address."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


class Exchange:
    """One request to an ASGI app by hand: `sent` are its messages; `hang_up()` is the client going away."""

    def __init__(self, app: Any, path: str, body: Any):
        self.app, self.path, self.body = app, path, json.dumps(body).encode()
        self.sent: list[dict[str, Any]] = []
        self.arrived = asyncio.Event()
        self._gone = asyncio.Event()
        self._read = False

    async def run(self) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        await self.app(scope, self._receive, self._send)

    def hang_up(self) -> None:
        self._gone.set()

    async def _receive(self) -> dict[str, Any]:
        if not self._read:
            self._read = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        self.arrived.set()
