"""A child process: its exit code, the end of its log, and that it never outlives us.

It gets a session of its own, so that Ctrl-C reaches lorakit alone, which drains first, and so that its workers can be
ended with it. If lorakit itself is killed (SIGKILL), a small shell that reads from a pipe to us notices and ends the
child: an orphan would hold the GPU's memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import signal
import subprocess
from collections import deque
from collections.abc import Mapping, Sequence

from ...errors import LorakitError

log = logging.getLogger("lorakit.vllm")
LINES, WIDTH = 200, 500  # of the log, kept for messages
# $0 is the process group to end once our end of the pipe closes.
_LEASH = 'read _; kill -TERM -- "-$0"; sleep 10; kill -KILL -- "-$0"'


class Process:
    """A running child. Made by `launch`."""

    def __init__(self, child: asyncio.subprocess.Process, argv: Sequence[str]):
        self.argv = list(argv)
        self._child = child
        self._lines: deque[str] = deque(maxlen=LINES)
        self._leash = subprocess.Popen(
            ["/bin/sh", "-c", _LEASH, str(child.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._reader = asyncio.create_task(self._read())
        self._exit = asyncio.create_task(self._wait())

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs. -9: ended by signal 9."""
        return self._child.returncode

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
            with contextlib.suppress(ProcessLookupError):
                self._child.terminate()
            await asyncio.wait([self._exit], timeout=grace)
        self._kill_group()
        await self._exit

    async def _wait(self) -> int:
        code = await self._child.wait()
        self._kill_group()  # workers that it left behind
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._reader, 2.0)  # the pipe's rest
        self._leash.kill()
        if self._leash.stdin is not None:
            self._leash.stdin.close()
        await asyncio.to_thread(self._leash.wait)
        return code

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended; on macOS a zombie is no group
            os.killpg(self._child.pid, signal.SIGKILL)

    async def _read(self) -> None:
        """Keep the last lines of its output. Progress bars end theirs with a carriage return."""
        assert self._child.stdout is not None
        rest = b""
        while data := await self._child.stdout.read(1 << 16):
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
        child = await asyncio.create_subprocess_exec(
            *argv,
            env=dict(environment),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        why = "there is no such command" if isinstance(error, FileNotFoundError) else os.strerror(error.errno or 0)
        raise LorakitError(
            f"vLLM cannot be started: '{argv[0]}': {why.lower()}\n"
            "  vLLM needs an environment of its own, as it pins other versions than lorakit:\n"
            "  python -m venv VENV && VENV/bin/pip install vllm, then --vllm VENV/bin/vllm"
        ) from error
    return Process(child, argv)
