"""The life of the vLLM engine's child: how it starts, dies, is started again and ends, with a stub in vLLM's place."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from engine_cases import STUB, Control, ValueSource, made
from vllm_served import GREEDY, PROMPT, A, alive, answered, processes, wait_for

from lorakit.bases.load import embedded_folder
from lorakit.errors import LorakitError
from lorakit.serve.engine import BASE, Work
from lorakit.serve.errors import EngineFailed
from lorakit.serve.vllm.argv import VllmSettings
from lorakit.serve.vllm.engine import VllmEngine


@pytest.mark.parametrize(
    ("switches", "message"),
    [({"die_at_start": 3}, "exit code 3"), ({"slow_start": 0.3, "die_at_start": 4}, "exit code 4")],
)
def test_a_vllm_that_dies_at_start_is_an_error_with_its_log(own, switches, message):
    own.control.set(**switches)
    with pytest.raises(EngineFailed, match=message) as failed:
        own.run(own.engine.start())
    assert "No available memory" in str(failed.value)
    assert "--max-lora-rank" in str(failed.value)
    assert not alive(own.control.log()[0]["pid"])


def test_a_vllm_that_is_never_ready_is_ended(own):
    own.control.set(never_ready=True)
    own.engine._ready_seconds = 1.5
    with pytest.raises(EngineFailed, match="not ready after"):
        own.run(own.engine.start())
    assert not alive(own.control.log()[0]["pid"])


def test_a_slow_start_is_waited_for(own):
    own.control.set(slow_start=1.0)
    assert own.run(own.engine.start()).context == 512


def test_commands_and_bases_that_do_not_exist(tmp_path):
    async def start(settings: VllmSettings) -> None:
        await VllmEngine(settings).start()

    with pytest.raises(LorakitError, match="pip install vllm"):
        asyncio.run(start(VllmSettings("embedded", (str(tmp_path / "vllm"),))))
    (tmp_path / "vllm").write_text("")
    with pytest.raises(LorakitError, match="permission denied"):
        asyncio.run(start(VllmSettings("embedded", (str(tmp_path / "vllm"),))))
    with pytest.raises(LorakitError, match="no model folder"):
        asyncio.run(start(VllmSettings(str(tmp_path / "nowhere"), (sys.executable,))))


def test_a_vllm_that_dies_is_started_again_with_its_adapters(own):
    own.run(own.engine.start())
    own.run(own.engine.load(A, ValueSource("adapter", made(1))))
    before = own.ids(((A, 1.0),)), own.ids(((A, 0.5),))
    own.control.set(die_after=2)

    async def scenario() -> None:
        with pytest.raises(EngineFailed) as failed:
            await answered(own.engine, ((A, 1.0),))
        assert failed.value.heals
        await asyncio.sleep(0.05)
        own.control.set()
        async with asyncio.timeout(20):
            while not own.engine.stats().alive:
                with pytest.raises(EngineFailed, match="being started again") as down:
                    own.engine.submit(Work(PROMPT, BASE, GREEDY))
                assert down.value.heals
                await asyncio.sleep(0.05)

    own.run(scenario())
    assert (own.ids(((A, 1.0),)), own.ids(((A, 0.5),))) == before
    starts = [event for event in own.control.log() if "argv" in event]
    assert len(starts) == len({start["pid"] for start in starts}) == 2
    assert len({start["environment"]["VLLM_API_KEY"] for start in starts}) == 2


def test_a_start_that_fails_is_tried_again(own):
    own.run(own.engine.start())
    own.control.set(die_after=0, die_at_start=1)

    async def scenario() -> None:
        with pytest.raises(EngineFailed):
            await answered(own.engine)
        async with asyncio.timeout(20):
            while sum("argv" in event for event in own.control.log()) < 2:
                await asyncio.sleep(0.02)
            own.control.set()
            while not own.engine.stats().alive:
                await asyncio.sleep(0.02)

    own.run(scenario())
    assert own.answer()[-1].finish == "length"


def test_a_vllm_that_dies_again_and_again_stays_down(own, monkeypatch):
    monkeypatch.setattr("lorakit.serve.vllm.child.RESTARTS", 1)
    own.engine = own.control.engine()
    own.run(own.engine.start())

    async def crash() -> None:
        own.control.set(die_after=0)
        with pytest.raises(EngineFailed):
            await answered(own.engine)
        own.control.set()

    async def up() -> None:
        async with asyncio.timeout(20):
            while not own.engine.stats().alive:
                await asyncio.sleep(0.05)

    own.run(crash())
    own.run(asyncio.sleep(0.1))
    own.run(up())
    own.run(crash())
    own.run(asyncio.sleep(0.3))
    with pytest.raises(EngineFailed, match="not started again") as down:
        own.answer()
    assert not down.value.heals
    assert not own.engine.stats().alive
    assert "/" not in str(down.value)  # clients read this


def test_stopping_ends_the_child_and_its_workers(own):
    own.control.set(worker=True)
    own.run(own.engine.start())
    pids = processes(own.control)
    assert all(alive(pid) for pid in pids)
    own.run(own.engine.stop(drain=0))
    assert not any(alive(pid) for pid in pids)
    argv = own.control.log()[0]["argv"]
    assert not Path(argv[argv.index("--uds") + 1]).parent.exists()


def test_a_vllm_that_is_killed_is_noticed_although_its_worker_lives(own):
    own.control.set(worker=True)
    own.run(own.engine.start())
    first = processes(own.control)

    async def scenario() -> None:
        os.kill(first[0], signal.SIGKILL)
        async with asyncio.timeout(20):
            while len(processes(own.control)) < 4 or not own.engine.stats().alive:
                await asyncio.sleep(0.02)

    own.run(scenario())
    assert not any(alive(pid) for pid in first)
    assert own.answer()[-1].finish == "length"


def test_the_child_and_its_workers_end_if_lorakit_is_killed(tmp_path):
    control = Control(tmp_path)
    control.set(worker=True)
    script = textwrap.dedent("""
        import asyncio, os, sys
        from lorakit.serve.vllm.process import launch
        async def main():
            await (await launch(sys.argv[1:], {**os.environ, "VLLM_API_KEY": "k"})).exited()
        asyncio.run(main())
    """)
    argv = [sys.executable, str(STUB), "serve", str(embedded_folder()), "--uds", str(tmp_path / "s")]
    ours = subprocess.Popen([sys.executable, "-c", script, *argv], env={**os.environ, "VLLM_STUB": str(control.file)})
    wait_for(lambda: (tmp_path / "s").exists())  # up, with its worker
    pids = processes(control)
    assert len(pids) == 2
    assert all(alive(pid) for pid in pids)
    ours.kill()
    ours.wait()
    wait_for(lambda: not any(alive(pid) for pid in pids), 20)
