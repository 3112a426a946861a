"""The vLLM engine over the stub, for the tests of `tests/serve/vllm`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_cases import Control

from lorakit.serve.engine import BASE, Choice, Piece, Sampling, Work
from lorakit.serve.vllm.engine import VllmEngine

PROMPT = (1700, 301, 22)
GREEDY = Sampling(max_tokens=6, temperature=0.0)
A, B = "aa" * 32, "bb" * 32


@dataclass
class Served:
    engine: VllmEngine
    control: Control
    run: Callable[[Coroutine[Any, Any, Any]], Any]

    def answer(self, choice: Choice = BASE, sampling: Sampling = GREEDY, ids: tuple[int, ...] = PROMPT) -> list[Piece]:
        return self.run(answered(self.engine, choice, sampling, ids))

    def ids(self, choice: Choice = BASE, sampling: Sampling = GREEDY) -> list[int]:
        return [token for piece in self.answer(choice, sampling) for token in piece.ids]


async def answered(
    engine: VllmEngine, choice: Choice = BASE, sampling: Sampling = GREEDY, ids: tuple[int, ...] = PROMPT
) -> list[Piece]:
    return [piece async for piece in engine.submit(Work(ids, choice, sampling))]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def processes(control: Control) -> list[int]:
    """The process ids of the stubs that were started, and of their workers."""
    return [event.get("pid") or event["worker"] for event in control.log() if "argv" in event or "worker" in event]


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
