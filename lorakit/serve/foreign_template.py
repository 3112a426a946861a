"""Chat templates that came with an adapter: programs that anybody may have written, so they run in a process apart.

Jinja's sandbox keeps a template from files and from Python's internals, but not from taking all time and memory: a line
such as {{ 10 ** 10 ** 10 }} holds the interpreter in one operation, which no thread, signal or event loop can end. In a
process of its own (`template_process`) it is ended by the operating system: processor time, memory and the length of
what it writes are bounded, and it can write no file and start no program. A template that exceeded a bound is refused
from then on; one that was ended because the machine is busy may be tried again. The process starts with the first such
template (0.2 s) and serves all; a rendering takes about a millisecond.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock, Timer
from typing import Any

from ..errors import DataError
from .errors import Busy

CHILD = Path(__file__).with_name("template_process.py")
PASSED_ON = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "TZ", "SYSTEMROOT")  # of the environment; no keys or tokens
REMEMBERED = 1_024  # templates that were refused
KILLED_FOR_TIME = -27  # SIGPROF
KILLED_FROM_OUTSIDE = -9  # SIGKILL: after `Bounds.wall`, or by the system when memory is short
RETRY_SECONDS = 5.0


@dataclass(frozen=True)
class Bounds:
    """What a template of an adapter may take. The longest of the 41 that TRL ships has 18,573 characters."""

    source: int = 262_144  # characters of the template
    seconds: float = 2.0  # of processor time, for one rendering
    request_seconds: float = 10.0  # of processor time, for all renderings of a request; there are some for each turn
    wall: float = 30.0  # seconds until an answer, however busy the machine is
    memory: int = 256 * 2**20  # bytes
    characters: int = 4_000_000  # of what it writes


class UnusableTemplateError(DataError):
    """A template that is invalid, or exceeds the bounds: not one that rejects a conversation."""


class TemplateProcess:
    """The process that renders foreign templates, started when it is needed and again after it was ended."""

    def __init__(self, bounds: Bounds):
        self.bounds = bounds
        self.spent = 0.0  # seconds of processor time, so far
        self._child: subprocess.Popen[bytes] | None = None
        self._refused: OrderedDict[str, str] = OrderedDict()  # by the hash of the template
        self._lock = Lock()
        self._closed = False

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """Return what a template writes.

        Raises DataError with the template's own error, or the bound it exceeded, and Busy where another try can help.
        """
        if len(source) > self.bounds.source:
            raise UnusableTemplateError(f"it has {len(source):,} characters; at most {self.bounds.source:,}")
        key = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        with self._lock:
            if key in self._refused:
                raise UnusableTemplateError(self._refused[key])
            try:
                return self._ask(source, variables)
            except _Exceeded as error:
                self._refused[key] = str(error)
                if len(self._refused) > REMEMBERED:
                    self._refused.popitem(last=False)
                raise UnusableTemplateError(str(error)) from error

    def close(self) -> None:
        """End the process."""
        self._closed = True
        child = self._child
        if child is not None:
            child.kill()
            child.wait()

    def _ask(self, source: str, variables: Mapping[str, Any]) -> str:
        child = self._started()
        assert child.stdin is not None
        assert child.stdout is not None
        request = json.dumps({"source": source, "variables": dict(variables)}).encode()
        late = Timer(self.bounds.wall, child.kill)
        late.start()
        try:
            child.stdin.write(struct.pack(">I", len(request)) + request)
            child.stdin.flush()
            head = child.stdout.read(4)
            size = struct.unpack(">I", head)[0] if len(head) == 4 else -1
            body = child.stdout.read(size) if size >= 0 else b""
        except OSError:
            size, body = -1, b""
        finally:
            late.cancel()
        if size < 0 or len(body) < size:
            self._child = None
            raise self._ended(child)
        answer = json.loads(body)
        self.spent += answer["seconds"]
        if "exceeded" in answer:
            raise _Exceeded(answer["exceeded"])
        if "invalid" in answer:
            raise UnusableTemplateError(f"it is no Jinja template: {answer['invalid']}")
        if "error" in answer:
            raise DataError(answer["error"])
        return str(answer["text"])

    def _ended(self, child: subprocess.Popen[bytes]) -> Exception:
        """Return why the process is gone."""
        child.kill()
        code = child.wait()
        self.spent += self.bounds.seconds
        if self._closed:
            return DataError("the server is stopping")
        if code == KILLED_FOR_TIME:
            return _Exceeded(f"it took more than {self.bounds.seconds:g} s of processor time")
        if code == KILLED_FROM_OUTSIDE:  # a busy machine does this to any template
            return Busy(
                f"the chat template could not be rendered within {self.bounds.wall:g} s and the memory that is free",
                RETRY_SECONDS,
            )
        return _Exceeded(f"it ended the process that renders it (status {code})")

    def _started(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise DataError("the server is stopping")
        if self._child is None or self._child.poll() is not None:
            environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
            self._child = subprocess.Popen(
                [sys.executable, "-P", str(CHILD), json.dumps(asdict(self.bounds))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is the server's
            )
        return self._child


class ForeignTemplate:
    """Stands in for a tokenizer's `apply_chat_template`, with a template that is rendered apart."""

    def __init__(self, process: TemplateProcess, source: str, special: Mapping[str, str]):
        self._process, self._source, self._special = process, source, dict(special)
        self._until = float("inf")  # of `process.spent`
        self.interrupted: Busy | None = None  # the last rendering that was ended from outside

    def begin(self) -> None:
        """Begin a request. All its renderings together have `Bounds.request_seconds`."""
        self._until = self._process.spent + self._process.bounds.request_seconds

    def __call__(
        self,
        turns: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        tokenize: bool,
        add_generation_prompt: bool,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Return the text of a conversation. chat_template: this template with its clock set (`templates.dated`)."""
        assert not tokenize, "only text is rendered here"
        if self._process.spent > self._until:
            seconds = self._process.bounds.request_seconds
            raise DataError(f"it took more than {seconds:g} s of processor time for this request")
        turns = [{name: value for name, value in turn.items() if value is not None} for turn in turns]
        variables = {
            **self._special,
            **kwargs,
            "messages": turns,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._process.render(chat_template or self._source, variables)
        except Busy as error:
            self.interrupted = error
            raise

    def check(self) -> None:
        """Try the template. Raises UnusableTemplateError; it may reject the conversation that it is tried on."""
        turns = [{"role": "user", "content": "Hello"}]
        try:
            self(turns, tools=None, tokenize=False, add_generation_prompt=True)
        except UnusableTemplateError:
            raise
        except DataError:
            return


class _Exceeded(Exception):
    """A bound was exceeded."""
