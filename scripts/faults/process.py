"""`lorakit serve` as a process of its own, and plain requests to it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
START_SECONDS = 120


class Server:
    """A running server. seconds, cpu_seconds: from its start until it was ready."""

    def __init__(self, args: Sequence[str]):
        """args: of `lorakit serve`. Raises RuntimeError with its log."""
        self.args = list(args)
        self.log: deque[str] = deque(maxlen=200)
        self.start()

    def start(self) -> None:
        began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lorakit", "serve", *self.args, "--port", "0"],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=ROOT,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._reader = threading.Thread(target=self.log.extend, args=(self.process.stderr,), daemon=True)
        self._reader.start()
        line = self.process.stdout.readline()
        self.seconds = time.monotonic() - began
        self.cpu_seconds = self._cpu_seconds()
        found = re.search(r"http://([^:/]+):(\d+)", line)
        if found is None:
            self.process.wait(10)
            self._reader.join(1)
            raise RuntimeError(f"the server did not start: {self.said()}")
        self.host, self.port = found[1], int(found[2])

    def said(self) -> str:
        """Return the end of its log."""
        return "".join(self.log)[-4000:]

    def _cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        self.start()

    def stop(self) -> tuple[int, float]:
        """Stop it by SIGTERM. Return its exit code, and the seconds it took."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        return self.process.returncode, time.monotonic() - began

    def alive(self) -> bool:
        return self.process.poll() is None

    def rss(self) -> int:
        """Return its resident memory in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(_number(r"VmRSS:\s+(\d+)", status)) * 1024

    # ------------------------------------------------------------------------------------------ requests

    def connect(self, seconds: float = 120) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=seconds)

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Send a request; body: JSON, or bytes as they are. Return status and body."""
        connection = self.connect()
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, {"content-type": "application/json"} if data is not None else {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """Return a number of /metrics."""
        page = self.ask("GET", "/metrics")[1].decode()
        return _number(rf"^{name} (\S+)$", page)

    def models(self) -> list[dict[str, Any]]:
        """Return /v1/models, without what changes from a start to the next."""
        data = json.loads(self.ask("GET", "/v1/models")[1])["data"]
        kept = [{name: model.get(name) for name in ("id", "root", "parent", "max_model_len")} for model in data]
        return sorted(kept, key=lambda model: model["id"])


def _number(pattern: str, text: str) -> float:
    """Return the number that the pattern's group finds on a line. Raises RuntimeError if there is none."""
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"nothing is like {pattern} in {text[:500]!r}")
    return float(found[1])


def events(answer: http.client.HTTPResponse) -> Iterator[Any]:
    """Yield the data of a stream's events; "DONE" at the end."""
    for line in answer:
        if line.startswith(b"data: "):
            data = line[6:].strip()
            yield "DONE" if data == b"[DONE]" else json.loads(data)
