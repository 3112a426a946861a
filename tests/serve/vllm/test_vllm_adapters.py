"""What vLLM has under which name, over the stub: adapters and mixes that come, go, and are used meanwhile."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import ValueSource, made
from vllm_served import GREEDY, PROMPT, A, B, answered

import lorakit as lk
from lorakit.serve.engine import BASE, Choice, Piece, Work
from lorakit.serve.errors import UnknownAdapter
from lorakit.serve.vllm import adapters


def delta(path: Path, module: str) -> torch.Tensor:
    update = lk.Adapter.load(path).factors[module]
    return update.scale * update.B.double() @ update.A.double()


def test_adapters_are_asked_for_by_key_and_mixes_by_a_file_of_their_sum(served):
    for choice in (BASE, ((A, 1.0),), ((A, 0.7), (B, 0.3)), ((B, 0.3), (A, 0.7)), ((A, 0.5),), ((A, 0.0),)):
        served.answer(choice)
    names = [body["model"] for body in served.control.bodies()[-6:]]
    assert [names[0], names[1], names[5]] == ["base", A, "base"]
    assert names[2] == names[3]
    paths = {body["lora_name"]: Path(body["lora_path"]) for body in served.control.bodies("/v1/load_lora_adapter")}
    module = "model.layers.0.self_attn.o_proj"
    first, second = (made(seed).factors[module] for seed in (1, 2))
    a, b = (f.scale * f.B.double() @ f.A.double() for f in (first, second))
    torch.testing.assert_close(delta(paths[A], module), a, atol=1e-6, rtol=0)
    torch.testing.assert_close(delta(paths[names[2]], module), 0.7 * a + 0.3 * b, atol=1e-6, rtol=0)
    torch.testing.assert_close(delta(paths[names[4]], module), 0.5 * a, atol=1e-6, rtol=0)


def test_weights_of_one_key_add_up(served):
    assert served.ids(((A, 0.25), (A, 0.75))) == served.ids(((A, 1.0),))


def test_a_mix_is_made_once_also_for_many_at_once(served):
    async def together() -> list[list[Piece]]:
        return await asyncio.gather(*(answered(served.engine, ((A, 0.2), (B, 0.1))) for _ in range(6)))

    before = len(served.control.bodies("/v1/load_lora_adapter"))
    served.run(together())
    assert len(served.control.bodies("/v1/load_lora_adapter")) == before + 1


def test_a_mix_is_finished_for_others_if_who_asked_hangs_up(served):
    async def scenario() -> list[Piece]:
        ticket = served.engine.submit(Work(PROMPT, ((A, 0.9), (B, 0.4)), GREEDY))
        await asyncio.sleep(0)
        ticket.cancel()
        return await answered(served.engine, ((A, 0.9), (B, 0.4)))

    before = len(served.control.bodies("/v1/load_lora_adapter"))
    assert served.run(scenario())[-1].finish == "length"
    assert len(served.control.bodies("/v1/load_lora_adapter")) == before + 1


def test_mixes_are_of_what_was_loaded_although_its_files_changed(served):
    source = ValueSource("changing", made(7))
    served.run(served.engine.load("77" * 32, source))
    source.fails = "the file changed"
    assert served.answer((("77" * 32, 0.5),))[-1].finish == "length"
    served.run(served.engine.unload("77" * 32))


def test_unused_mixes_make_room_and_go_with_their_adapters(served, monkeypatch):
    monkeypatch.setattr(adapters, "MIXES", 2)
    served.run(served.engine.load("88" * 32, ValueSource("mixed", made(8))))
    for weight in (0.1, 0.2, 0.3, 0.4):
        served.answer((("88" * 32, weight),))
    unloaded = [body["lora_name"] for body in served.control.bodies("/v1/unload_lora_adapter")]
    served.run(served.engine.unload("88" * 32))
    after = [body["lora_name"] for body in served.control.bodies("/v1/unload_lora_adapter")][len(unloaded) :]
    assert "88" * 32 in after
    assert len(set(after)) == len(after) == 3  # two mixes, and the adapter
    with pytest.raises(UnknownAdapter):
        served.answer((("88" * 32, 0.4),))


def test_loading_while_it_is_being_forgotten(served):
    """Of one content two names may go and come at the same time."""
    key = "c0" * 32
    served.run(served.engine.load(key, ValueSource("going", made(5))))
    before = served.ids(((key, 1.0),)), served.ids(((key, 0.5),))
    served.control.set(unload_seconds=0.3)

    async def scenario() -> None:
        going = asyncio.create_task(served.engine.unload(key))
        await asyncio.sleep(0.1)
        await served.engine.load(key, ValueSource("coming", made(5)))
        await going

    served.run(scenario())
    assert (served.ids(((key, 1.0),)), served.ids(((key, 0.5),))) == before
    served.run(served.engine.unload(key))


def test_many_mixes_at_once_are_all_answered(served, monkeypatch):
    """While one mix is unloaded to make room, others come, and those that were unused get users."""
    monkeypatch.setattr(adapters, "MIXES", 1)
    served.control.set(unload_seconds=0.02)

    async def together(first: float) -> list[list[Piece]]:
        choices: list[Choice] = [((A, first + 0.1 * n), (B, 0.5)) for n in range(6)]
        return await asyncio.gather(*(answered(served.engine, choice) for choice in (*choices, *choices)))

    for first in (1.0, 2.0, 1.0):
        assert {pieces[-1].finish for pieces in served.run(together(first))} == {"length"}


def test_an_unload_takes_the_mix_along_that_is_made_for_somebody_who_hung_up(served, monkeypatch):
    key = "ab" * 32
    served.run(served.engine.load(key, ValueSource("going", made(5))))
    slow_down(monkeypatch, 0.2)

    async def scenario() -> None:
        ticket = served.engine.submit(Work(PROMPT, ((key, 0.5), (B, 0.5)), GREEDY))
        await asyncio.sleep(0.05)  # now it is exported
        ticket.cancel()
        assert [piece.finish async for piece in ticket] == ["cancelled"]
        await asyncio.wait_for(served.engine.unload(key), 20)

    before = names_at_vllm(served), held(served)
    served.run(scenario())
    assert before[0] - names_at_vllm(served) == {key}
    assert names_at_vllm(served) <= before[0]
    assert before[1] - held(served) == {key}


def test_the_event_loop_goes_on_while_an_adapter_is_exported(served, monkeypatch):
    key, other = "e1" * 32, "e2" * 32
    served.run(served.engine.load(key, ValueSource("going", made(5))))
    slow_down(monkeypatch, 0.6)

    async def scenario() -> float:
        loading = asyncio.create_task(served.engine.load(other, ValueSource("coming", made(6))))
        await asyncio.sleep(0.2)
        began = time.monotonic()
        await served.engine.unload(key)
        seconds = time.monotonic() - began
        assert not loading.done()
        await loading
        return seconds

    assert served.run(scenario()) < 0.4
    served.run(served.engine.unload(other))


def test_an_unload_while_vllm_is_down_gives_the_folder_back(own):
    own.run(own.engine.start())
    own.run(own.engine.load(A, ValueSource("adapter", made(1))))

    async def scenario() -> int:
        own.control.set(hang_after=1)
        ticket = own.engine.submit(Work(PROMPT, ((A, 1.0),), GREEDY))
        await anext(ticket)
        unloading = asyncio.create_task(own.engine.unload(A))
        await asyncio.sleep(0)
        await own.engine._child.client.aclose()  # as when vLLM ends
        own.control.set()
        ticket.cancel()
        return await asyncio.wait_for(unloading, 20)

    assert own.run(scenario()) > 0
    assert held(own) == set()
    with pytest.raises(UnknownAdapter):
        own.answer(((A, 1.0),))


def slow_down(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let exports take time."""
    export = adapters.export

    def slow(*args: Any, **settings: Any) -> Any:
        time.sleep(seconds)
        return export(*args, **settings)

    monkeypatch.setattr(adapters, "export", slow)


def names_at_vllm(served: Any) -> set[str]:
    async def names() -> set[str]:
        answer = await served.engine._child.client._http.get("/v1/models")
        return {model["id"] for model in answer.json()["data"]}

    return served.run(names())


def held(served: Any) -> set[str]:
    return set(served.engine._cache._held)
