"""A child process: its exit code, the end of its log, and that it never outlives us.

It gets a session of its own, so that Ctrl-C reaches lorakit alone, which drains first, and so that its workers can be
ended with it. If lorakit itself is killed (SIGKILL), a small process that reads from a pipe to us notices and ends the
child and its workers: orphans would hold the GPU's memory.

Two threads wait for the exit and read the output. asyncio's own processes would not do: up to Python 3.12 their `wait`
returns only when the output is closed, and workers of a vLLM that was killed hold it open.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence

from ...errors import LorakitError

log = logging.getLogger("lorakit.vllm")
LINES, WIDTH = 200, 500  # of the log, kept for messages
# Ends the process group argv[1] once our end of the pipe closes.
_LEASH = """
import os, signal, sys, time
os.read(0, 1)
for number, pause in (signal.SIGTERM, 10), (signal.SIGKILL, 0):
    try:
        os.killpg(int(sys.argv[1]), number)
    except ProcessLookupError:
        break
    for _ in range(10 * pause):
        time.sleep(0.1)
        try:
            os.killpg(int(sys.argv[1]), 0)
        except ProcessLookupError:
            break
"""


class Process:
    """A running child. Made by `launch`."""

    def __init__(self, child: subprocess.Popen[bytes], argv: Sequence[str]):
        self.argv = list(argv)
        self.code: int | None = None  # the exit code; None while it runs; -9: ended by signal 9
        self._child = child
        self._lines: deque[str] = deque(maxlen=LINES)
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._leash = subprocess.Popen(
            [sys.executable, "-ISc", _LEASH, str(child.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name="vllm-log", daemon=True)
        self._reader.start()
        threading.Thread(target=self._wait, args=(self._exit.get_loop(),), name="vllm-exit", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._child.pid

    async def exited(self) -> int:
        """Wait for the end; return the exit code."""
        return await asyncio.shield(self._exit)

    def tail(self, lines: int = 30) -> str:
        """Return the last lines of its output, indented, for a message."""
        kept = list(self._lines)[-lines:]
        return "\n".join(f"  | {line}" for line in kept) or "  | (it printed nothing)"

    def command(self) -> str:
        """Return the command line as one would type it."""
        return shlex.join(self.argv)

    async def stop(self, grace: float = 10.0) -> None:
        """End it and its workers: SIGTERM, and SIGKILL after `grace` seconds."""
        if self.code is None:
            self._child.terminate()
            await asyncio.wait([self._exit], timeout=grace)
        self._kill_group()
        await self.exited()

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait for the exit, in a thread; then end what it left behind."""
        code = self._child.wait()
        self._kill_group()
        self._reader.join(timeout=2.0)  # the rest of its output
        self._leash.kill()
        self._leash.communicate()
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._ended, code)

    def _ended(self, code: int) -> None:
        self.code = code
        self._exit.set_result(code)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended; on macOS a zombie is no group
            os.killpg(self._child.pid, signal.SIGKILL)

    def _read(self) -> None:
        """Keep the last lines of its output, in a thread. Progress bars end theirs with a carriage return."""
        assert self._child.stdout is not None
        rest = b""
        with self._child.stdout as output:
            while data := os.read(output.fileno(), 1 << 16):
                *lines, rest = (rest + data).replace(b"\r", b"\n").split(b"\n")
                rest = rest[-WIDTH:]
                for line in lines:
                    self._keep(line)
        self._keep(rest)

    def _keep(self, line: bytes) -> None:
        text = line[:WIDTH].decode("utf8", "replace").rstrip()
        if text:
            self._lines.append(text)
            log.info("%s", text)


async def launch(argv: Sequence[str], environment: Mapping[str, str]) -> Process:
    """Start a child. Raises LorakitError if there is no such command."""
    if os.name == "nt":
        raise LorakitError("vLLM does not run on Windows\n  use the embedded engine (--engine embedded), or WSL")
    try:
        child = subprocess.Popen(
            argv,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            bufsize=0,
        )
    except OSError as error:
        why = "there is no such command" if isinstance(error, FileNotFoundError) else os.strerror(error.errno or 0)
        raise LorakitError(
            f"vLLM cannot be started: '{argv[0]}': {why.lower()}\n"
            "  vLLM needs an environment of its own, as it pins other versions than lorakit:\n"
            "  python -m venv VENV && VENV/bin/pip install vllm, then --vllm VENV/bin/vllm"
        ) from error
    return Process(child, argv)
