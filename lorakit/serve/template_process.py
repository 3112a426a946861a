"""The program that renders foreign chat templates (see `foreign_template`). Run as a file; imports no lorakit.

stdin: requests, stdout: answers; each is four bytes of length, big-endian, and JSON.

    {"source": TEMPLATE, "variables": {"messages": [...], ...}}    a request
    {"text": ...}, {"error": ...}, {"invalid": ...} or {"exceeded": ...}, and {"seconds": ...}    its answer

The environment that templates see is the one that transformers gives them (`utils/chat_template_utils.py`); a test
compares the two over every template that TRL ships. One rendering gets so many seconds of processor time; then the
system ends this process, whatever it is doing (SIGPROF).
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks what an assistant wrote, for those who train on it. Here it changes nothing."""

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Callable[[], str]) -> str:
        return caller()


class Namespace(jinja2.utils.Namespace):
    """A namespace without names that begin with an underscore. Jinja's own finds no methods of a subclass."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args  # as jinja's does, so that `namespace(self=...)` works
        for name in dict(*rest, **kwargs):
            check_name(name)
        jinja2.utils.Namespace.__init__(self, *rest, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        check_name(name)
        super().__setitem__(name, value)


def check_name(name: object) -> None:
    """Raise SecurityError for the name of an attribute that is Python's own."""
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not have the attribute {name!r}")


class Dict:
    """`dict` for templates: the calls that they use, and no class to reach others from."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own escapes HTML, which a prompt must not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: object) -> None:
    raise jinja2.exceptions.TemplateError(str(message))


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@lru_cache(maxsize=64)
def compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": Dict(),
        "namespace": Namespace,
    }
    return environment.from_string(source)


def rendered(request: dict[str, Any], characters: int) -> dict[str, str]:
    """Return the answer to a request."""
    pieces, length = [], 0
    try:
        for piece in compiled(request["source"]).generate(**request["variables"]):
            length += len(piece)
            if length > characters:
                return {"exceeded": f"it writes more than {characters:,} characters"}
            pieces.append(piece)
    except jinja2.TemplateSyntaxError as error:
        return {"invalid": f"line {error.lineno}: {error.message}"[:1_000]}
    except MemoryError:
        return {"exceeded": "it needs more memory than it may have"}
    except Exception as error:  # a template is a program, and may raise anything
        return {"error": (str(error) or type(error).__name__)[:1_000]}
    return {"text": "".join(pieces)}


def limit(memory: int) -> None:
    """Take from this process what it does not need: memory, files, further processes."""
    try:
        import resource
    except ImportError:  # Windows: the server's own clock remains
        return
    page = os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * page
    except OSError:  # no Linux
        used = 2**30
    wishes = {"RLIMIT_AS": used + memory, "RLIMIT_FSIZE": 0, "RLIMIT_NPROC": 0, "RLIMIT_CORE": 0}
    for name, value in wishes.items():
        kind = getattr(resource, name, None)
        if kind is not None:
            resource.setrlimit(kind, (value, value))


def serve(inbox: BinaryIO, outbox: BinaryIO, seconds: float, characters: int) -> None:
    """Answer requests until there are no more."""
    has_timer = hasattr(signal, "setitimer")
    while len(head := inbox.read(4)) == 4:
        request = json.loads(inbox.read(struct.unpack(">I", head)[0]))
        if has_timer:
            signal.setitimer(signal.ITIMER_PROF, seconds)
        began = time.process_time()
        answer = rendered(request, characters)
        body = json.dumps({**answer, "seconds": time.process_time() - began}).encode()
        if has_timer:
            signal.setitimer(signal.ITIMER_PROF, 0)
        outbox.write(struct.pack(">I", len(body)) + body)
        outbox.flush()


def main() -> None:
    """Run with the bounds as JSON in the first argument."""
    bounds = json.loads(sys.argv[1])
    limit(bounds["memory"])
    serve(sys.stdin.buffer, sys.stdout.buffer, bounds["seconds"], bounds["characters"])


if __name__ == "__main__":
    main()
