"""Engines over the stub."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from engine_cases import Control, ValueSource, made
from vllm_served import A, B, Served


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Iterator[Served]:
    """An engine with the adapters A and B, for all tests that leave it as it was."""
    with pytest.MonkeyPatch.context() as environment, asyncio.Runner() as runner:
        control = Control(tmp_path_factory.mktemp("stub"))
        environment.setenv("VLLM_STUB", str(control.file))
        environment.setenv("LORAKIT_API_KEY", "ours")
        engine = control.engine()
        runner.run(engine.start())
        for key, seed in ((A, 1), (B, 2)):
            runner.run(engine.load(key, ValueSource(f"adapter-{seed}", made(seed))))
        yield Served(engine, control, runner.run)
        runner.run(engine.stop(drain=0))


@pytest.fixture
def served(shared: Served) -> Iterator[Served]:
    shared.control.set()
    yield shared
    shared.control.set()


@pytest.fixture
def own(tmp_path, monkeypatch) -> Iterator[Served]:
    """An engine that is not started yet, for a test that ends or breaks it."""
    monkeypatch.setattr("lorakit.serve.vllm.child.PAUSE", 0.05)
    control = Control(tmp_path)
    monkeypatch.setenv("VLLM_STUB", str(control.file))
    with asyncio.Runner() as runner:
        engine = control.engine()
        yield Served(engine, control, runner.run)
        runner.run(engine.stop(drain=0))
