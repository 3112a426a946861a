"""A started engine of each kind with two adapters, for the contract of engines: fixtures and what asks them.

A test module takes the fixtures by `running, slow = engine_running.running, engine_running.slow`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import engine_cases
import pytest
from engine_cases import CASES, Case, ValueSource

from lorakit.serve.engine import BASE, Choice, Engine, Facts, Piece, Sampling, Work
from lorakit.serve.ticket import Ticket

PROMPT = (1700, 301, 22, 2950, 640)
A, B = "aa" * 32, "bb" * 32
ONE: Choice = ((A, 1.0),)
MIX: Choice = ((A, 0.7), (B, 0.3))
GREEDY = Sampling(max_tokens=12, temperature=0.0)
LONG = Sampling(max_tokens=400, temperature=0.0)


@dataclass
class Running:
    """A started engine with the adapters A and B, on an event loop of its own."""

    case: Case
    engine: Engine
    facts: Facts
    run: Callable[[Coroutine[Any, Any, Any]], Any]

    def answer(self, sampling: Sampling = GREEDY, choice: Choice = BASE, ids: tuple[int, ...] = PROMPT) -> list[Piece]:
        return self.run(answered(self.engine, Work(ids, choice, sampling)))


async def answered(engine: Engine, work: Work) -> list[Piece]:
    return await collected(engine.submit(work))


async def collected(ticket: Ticket) -> list[Piece]:
    return [piece async for piece in ticket]


def ids_of(pieces: list[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.ids]


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture(scope="module", params=CASES)
def running(request, tmp_path_factory) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as environment, asyncio.Runner() as runner:
        case = CASES[request.param](tmp_path_factory.mktemp("engine"), environment)
        engine = runner.run(made(case, 64))
        facts = runner.run(engine.start())
        for key, seed in ((A, 1), (B, 2)):
            runner.run(engine.load(key, ValueSource(f"adapter-{seed}", engine_cases.made(seed))))
        yield Running(case, engine, facts, runner.run)
        runner.run(engine.stop(drain=0))


async def made(case: Case, places: int) -> Engine:
    return case.engine(places)


@pytest.fixture
def slow(running: Running) -> Iterator[None]:
    """Let tokens take time, so that requests can be looked at while they run."""
    running.case.pace(running.engine, 0.02)
    yield
    running.case.pace(running.engine, 0.0)
