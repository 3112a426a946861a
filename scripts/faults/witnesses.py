"""Streams of other clients, that must go on unchanged whatever is done to the server beside them."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence

from .process import Server, events

PROMPTS = ("The old man looked at the sea and", "name[The Punter], food[Italian]", "It was a dark night;", "She said")
TOKENS = 24


def answer(server: Server, model: str, prompt: str) -> str:
    """Return a greedy answer that was streamed to its end. Raises RuntimeError if it was not."""
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True}
    connection = server.connect()
    try:
        connection.request("POST", "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise RuntimeError(f"{reply.status} {reply.read()[:200]!r}")
        text, last = "", None
        for event in events(reply):
            if event == "DONE":
                last = event
            elif "error" in event:
                raise RuntimeError(str(event["error"]))
            else:
                text += "".join(choice["text"] for choice in event["choices"])
        if last is None:
            raise RuntimeError("the stream ended without [DONE]")
        return text
    finally:
        connection.close()


class Witnesses:
    """Threads that ask for the same answers again and again, as long as the block runs.

    `answers`: how many were as before. `changed`, `failed`: what was not.
    """

    def __init__(self, server: Server, models: Sequence[str], threads: int = 4):
        self.server, self.threads = server, threads
        self.expected = {(model, prompt): answer(server, model, prompt) for model in models for prompt in PROMPTS}
        self.answers, self.changed, self.failed = 0, list[str](), list[str]()
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def __enter__(self) -> Witnesses:
        self._stop.clear()
        self._running = [threading.Thread(target=self._ask, args=(at,)) for at in range(self.threads)]
        for thread in self._running:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._running:
            thread.join()

    def _ask(self, at: int) -> None:
        cases = list(self.expected.items())
        while not self._stop.is_set():
            (model, prompt), expected = cases[at % len(cases)]
            at += 1
            try:
                got = answer(self.server, model, prompt)
            except Exception as error:
                with self._lock:
                    self.failed.append(f"{model}: {type(error).__name__}: {error}")
                self._stop.wait(0.2)
                continue
            with self._lock:
                self.answers += 1
                if got != expected:
                    self.changed.append(f"{model}: {got!r} instead of {expected!r}")
