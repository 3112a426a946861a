"""The vLLM engine with a stub in vLLM's place: what the child is asked, and what it may do wrong."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import ValueSource, made
from vllm_served import GREEDY, PROMPT, A, B, answered, wait_for

import lorakit as lk
from lorakit.bases.load import embedded_folder
from lorakit.errors import AdapterError
from lorakit.serve.engine import BASE, Piece, Sampling, Work
from lorakit.serve.errors import Busy, Cannot, EngineFailed, UnknownAdapter
from lorakit.serve.vllm import adapters


def delta(path: Path, module: str) -> torch.Tensor:
    update = lk.Adapter.load(path).factors[module]
    return update.scale * update.B.double() @ update.A.double()


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
    assert after[-1] == "88" * 32
    assert len(after) == 3  # two mixes, and the adapter
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


def test_an_empty_prompt_and_no_tokens(served):
    with pytest.raises(Cannot, match="empty"):
        served.answer(ids=())
    assert [piece.finish for piece in served.answer(sampling=Sampling(0))] == ["length"]
