"""The vLLM engine with a stub in vLLM's place: what the child is asked, and what it may do wrong."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import ValueSource, made
from vllm_served import GREEDY, PROMPT, A, wait_for

import lorakit as lk
from lorakit.bases.load import embedded_folder
from lorakit.errors import AdapterError
from lorakit.serve.engine import BASE, Piece, Sampling, Work
from lorakit.serve.errors import Busy, Cannot, EngineFailed


def test_the_child_gets_its_key_by_the_environment_alone(served):
    started = served.control.log()[0]
    argv, environment = started["argv"], started["environment"]
    assert argv[1:3] == ["serve", str(embedded_folder())]
    assert argv[argv.index("--max-lora-rank") + 1] == "32"
    socket = Path(argv[argv.index("--uds") + 1])
    assert socket.is_socket()
    assert socket.parent.stat().st_mode & 0o077 == 0  # nobody else may enter
    key = environment["VLLM_API_KEY"]
    assert len(key) == 64
    assert not any(key in argument for argument in argv)
    assert environment["VLLM_NO_USAGE_STATS"] == environment["DO_NOT_TRACK"] == "1"
    assert "LORAKIT_API_KEY" not in environment
    assert all(event["authorized"] for event in served.control.log() if "path" in event)


def test_ranks_beyond_the_flag_are_refused_with_the_flag(served):
    with pytest.raises(AdapterError, match="--max-rank 64"):
        served.run(served.engine.load("64" * 32, ValueSource("large", made(3, rank=40))))
    served.run(served.engine.load("20" * 32, ValueSource("medium", made(3, rank=20))))
    served.run(served.engine.load("12" * 32, ValueSource("other", made(4, rank=12))))
    with pytest.raises(Cannot, match="--max-rank 64") as refused:
        served.answer((("20" * 32, 0.5), ("12" * 32, 0.5), (A, 0.5)))
    assert refused.value.what == "mix"
    for choice in ((("20" * 32, 0.5), ("12" * 32, 0.5)), (("20" * 32, 0.5),)):  # 20 + 12, in files of rank 32 and 16
        assert served.answer(choice)[-1].finish == "length"
    for key in ("20" * 32, "12" * 32):
        served.run(served.engine.unload(key))


def test_kinds_that_vllm_does_not_know_are_refused_with_a_way_out(served):
    live = lk.attach(_model(), lk.LoraConfig(rank=2, targets=["q_proj"], variant="dora"))
    with pytest.raises(AdapterError, match="DoRA") as refused:
        served.run(served.engine.load("d0" * 32, ValueSource("dora", lk.capture(live))))
    assert "lorakit merge" in str(refused.value)
    other = lk.Adapter(lk.LoraConfig(rank=4, targets=["o_proj"], task="SEQ_CLS"), made(1).updates)
    with pytest.raises(AdapterError, match="another task"):
        served.run(served.engine.load("5e" * 32, ValueSource("labels", other)))


def test_an_adapter_of_another_base_is_refused(served):
    model = _model()
    model.model.layers[3].self_attn.q_proj.weight.data += 1
    live = lk.attach(model, lk.LoraConfig(rank=2, targets=["q_proj"]))
    with pytest.raises(AdapterError, match="another base"):
        served.run(served.engine.load("0b" * 32, ValueSource("other", lk.capture(live))))


def _model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32)


def test_what_vllm_does_not_load_is_an_error_without_paths(served):
    served.control.set(load_status=500)
    with pytest.raises(AdapterError, match="the stub was told so") as refused:
        served.run(served.engine.load("cc" * 32, ValueSource("refused", made(5))))
    assert "/" not in str(refused.value)
    served.control.set()
    served.run(served.engine.load("cc" * 32, ValueSource("refused", made(5))))
    served.control.set(unload_status=500)  # as recent versions do for an adapter that they evicted
    served.run(served.engine.unload("cc" * 32))
    served.control.set()
    served.run(served.engine.load("cc" * 32, ValueSource("again", made(5))))  # "has already been loaded" is no error
    served.run(served.engine.unload("cc" * 32))


@pytest.mark.parametrize(
    ("switches", "kind", "message"),
    [
        ({"status": 500}, EngineFailed, "status 500"),
        ({"status": 503}, Busy, "no more requests"),
        ({"status": 429}, Busy, "no more requests"),
        ({"status": 400, "param": "temperature"}, Cannot, "the stub was told so"),
        ({"half_after": 0}, EngineFailed, "broke"),
        ({"half_after": 3}, EngineFailed, "broke"),
        ({"error_after": 2}, EngineFailed, "EngineCore died"),
        ({"error_after": 0, "error_code": 400}, Cannot, "refuses this request: EngineCore died"),
        ({"abort_after": 2}, EngineFailed, "abort"),
        ({"no_ids": True}, EngineFailed, r"0\.10\.2"),
    ],
)
def test_misbehaviour_is_an_error_and_the_next_request_is_answered(served, switches, kind, message):
    before = served.ids()
    served.control.set(**switches)
    with pytest.raises(kind, match=message):
        served.answer()
    served.control.set()
    assert served.ids() == before
    stats = served.engine.stats()
    assert (stats.running, stats.waiting, stats.alive) == (0, 0, True)


def test_a_request_that_hangs_ends_at_its_deadline_and_at_a_hang_up(served):
    served.control.set(hang_after=2)
    work = Work(PROMPT, BASE, GREEDY, deadline=time.monotonic() + 0.3)

    async def scenario() -> tuple[list[Piece], list[Piece]]:
        late = [piece async for piece in served.engine.submit(work)]
        ticket = served.engine.submit(Work((5, 6), BASE, GREEDY))
        first = await anext(ticket)
        ticket.cancel()
        return late, [first, *[piece async for piece in ticket]]

    late, left = served.run(scenario())
    assert (late[-1].finish, left[-1].finish) == ("timeout", "cancelled")
    assert [len(piece.ids) for piece in late] == [1, 1, 0]
    # vLLM notices, and frees the slot
    wait_for(lambda: sum("aborted" in event for event in served.control.log()) >= 2)


def test_texts_with_line_separators_and_several_tokens_an_event(served):
    before = served.ids()
    served.control.set(text="\u2028\u0085\n", chunk=4)
    assert [len(piece.ids) for piece in served.answer()] == [4, 2, 0]
    assert served.ids() == before


def test_cached_tokens_come_with_the_last_piece(served):
    served.control.set(cached=2)
    before = served.engine.stats()
    assert [piece.cached for piece in served.answer()][-1] == 2
    after = served.engine.stats()
    assert (after.cached_tokens - before.cached_tokens, after.prompt_tokens - before.prompt_tokens) == (2, 3)


def test_a_client_that_does_not_read_is_cancelled(served):
    async def scenario() -> list[Piece]:
        ticket = served.engine.submit(Work((9,), BASE, Sampling(511, temperature=0.0)))
        other = served.engine.submit(Work((9, 9), BASE, GREEDY))
        await asyncio.sleep(0.2)
        assert [piece.finish async for piece in other][-1] == "length"
        return [piece async for piece in ticket]

    assert served.run(scenario())[-1].finish in ("length", "cancelled")
