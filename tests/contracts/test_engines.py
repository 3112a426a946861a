"""What every engine keeps: token ids in, token ids out, whoever else is in the batch; what ends an answer, what is
refused, and what loading and unloading do to requests that run.

A new engine is a row of `engine_cases.CASES`. With LORAKIT_VLLM=VENV/bin/vllm the same runs against a real vLLM.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from typing import Any

import engine_cases
import pytest
import torch
from engine_cases import CASES, Case, ValueSource

import lorakit as lk
from lorakit.bases.load import load_model
from lorakit.errors import AdapterError, LorakitError
from lorakit.serve.engine import BASE, Choice, Engine, Facts, Piece, Sampling, Work
from lorakit.serve.errors import Busy, Cannot, EngineFailed, Stopping, TooLong, UnknownAdapter
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


def submit_many(engine: Engine, tickets: list[Ticket]) -> None:
    """Ask until the engine refuses: it may compute some requests and let others wait."""
    for _ in range(400):
        tickets.append(engine.submit(Work(PROMPT, BASE, LONG)))


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


def test_facts(running):
    facts = running.facts
    assert (facts.context, facts.vocabulary) == (512, engine_cases.VOCABULARY)
    assert facts.base
    assert facts.max_logprobs >= 5
    assert facts.can <= {"mix", "scale", "schema", "logprobs", "logit_bias", "min_p", "repetition"}


def test_an_answer_has_max_tokens_and_one_end(running):
    pieces = running.answer()
    assert len(ids_of(pieces)) == 12
    assert [piece.finish for piece in pieces if piece.finish] == ["length"]
    assert pieces[-1].finish == "length"
    assert all(not piece.logprobs for piece in pieces)
    assert all(0 <= token < running.facts.vocabulary for token in ids_of(pieces))


def test_one_token(running):
    assert ids_of(running.answer(replace(GREEDY, max_tokens=1))) == ids_of(running.answer())[:1]


def test_choices_answer_differently(running):
    choices = [BASE, ONE, ((B, 1.0),), ((A, 0.5),), MIX]
    answers = {tuple(ids_of(running.answer(choice=choice))) for choice in choices}
    assert len(answers) == len(choices)


def test_greedy_answers_do_not_depend_on_the_batch(running):
    prompts = [tuple(range(50 + 7 * n, 60 + 11 * n)) for n in range(4)]
    works = [Work(ids, choice, GREEDY) for ids in prompts for choice in (BASE, ONE, ((B, 1.0),), MIX)]
    alone = [ids_of(running.run(answered(running.engine, work))) for work in works]

    async def together() -> list[list[Piece]]:
        return await asyncio.gather(*(answered(running.engine, work) for work in works))

    assert [ids_of(pieces) for pieces in running.run(together())] == alone


def test_greedy_answers_are_the_models_with_each_choice_alone(running):
    """The oracle is the model with the adapters attached, computed anew for each token."""
    if not running.case.computes:
        pytest.skip("this engine computes nothing, or in 16 bits")
    model = load_model("embedded", torch.float32, torch.device("cpu"))
    for name, seed in (("a", 1), ("b", 2)):
        lk.attach(model, engine_cases.made(seed), name=name)
    actives: list[tuple[Choice, Any]] = [(BASE, None), (ONE, "a"), (((B, 1.0),), "b"), (MIX, {"a": 0.7, "b": 0.3})]
    for choice, active in [*actives, (((A, 0.5),), {"a": 0.5})]:
        lk.activate(model, active)
        ids = list(PROMPT)
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert ids_of(running.answer(choice=choice)) == ids[len(PROMPT) :], choice


def test_stop_ids_end_the_answer_and_are_not_part_of_it(running):
    whole = ids_of(running.answer(choice=ONE))
    end = next(token for at, token in enumerate(whole) if at >= 3 and token not in whole[:at])
    pieces = running.answer(replace(GREEDY, stop_ids=frozenset({end}), logprobs=0), ONE)
    assert ids_of(pieces) == whole[: whole.index(end)]
    assert sum(len(piece.logprobs) for piece in pieces) == whole.index(end)
    assert pieces[-1].finish == "stop"


def test_an_answer_that_stops_at_once_is_empty(running):
    first = ids_of(running.answer())[0]
    pieces = running.answer(replace(GREEDY, stop_ids=frozenset({first})))
    assert (ids_of(pieces), pieces[-1].finish) == ([], "stop")


@pytest.mark.parametrize("count", [0, 1, 5])
def test_logprobs(running, count):
    pieces = running.answer(replace(GREEDY, logprobs=count))
    tokens = [token for piece in pieces for token in piece.logprobs]
    assert [token.id for token in tokens] == ids_of(pieces) == ids_of(running.answer())
    for token in tokens:
        values = [value for _, value in token.alternatives]
        assert len(values) == count
        assert values == sorted(values, reverse=True)
        assert len({id for id, _ in token.alternatives}) == count
        assert token.logprob <= 0
        if count:  # greedy: the likeliest is the one picked
            assert token.alternatives[0] == (token.id, pytest.approx(token.logprob))


def test_too_many_logprobs_are_refused_or_given(running):
    asked = running.facts.max_logprobs
    pieces = running.answer(replace(GREEDY, max_tokens=2, logprobs=asked))
    assert all(len(token.alternatives) == asked for piece in pieces for token in piece.logprobs)


def test_logit_bias(running):
    whole = ids_of(running.answer())
    assert ids_of(running.answer(replace(GREEDY, max_tokens=3, logit_bias=((77, 100.0),)))) == [77] * 3
    without = ids_of(running.answer(replace(GREEDY, max_tokens=1, logit_bias=((whole[0], -100.0),))))
    assert without != whole[:1]


def test_a_seed_repeats_an_answer(running):
    warm = replace(GREEDY, temperature=1.5, seed=5)
    first = ids_of(running.answer(warm, ONE))
    assert ids_of(running.answer(warm, ONE)) == first
    others = [ids_of(running.answer(replace(warm, seed=seed), ONE)) for seed in (6, 7, 8)]
    assert any(other != first for other in others)


def test_a_schema_is_kept(running):
    from lorakit.bases.load import load_tokenizer

    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    schema["additionalProperties"] = False
    sampling = Sampling(60, temperature=0.0, schema=json.dumps(schema), stop_ids=frozenset({0}))
    pieces = running.answer(sampling)
    text = load_tokenizer("embedded").decode(ids_of(pieces))
    if pieces[-1].finish == "length":  # a small model may write digits without end, and says so
        assert text.startswith("{")
    else:
        assert isinstance(json.loads(text)["n"], int)
        assert pieces[-1].finish == "stop"


def test_all_settings_at_once(running):
    sampling = Sampling(
        6, 0.8, 0.9, 20, 0.05, 3, frozenset({0, 1}), 2, ((5, 1.5),), presence=0.5, frequency=-0.5, repetition=1.1
    )
    pieces = running.answer(sampling, ONE)
    assert pieces[-1].finish in ("stop", "length")
    assert len(ids_of(pieces)) <= 6


def test_cancelling_ends_the_answer_and_frees_the_slot(running, slow):
    async def scenario() -> list[Piece]:
        ticket = running.engine.submit(Work(PROMPT, ONE, LONG))
        first = await anext(ticket)
        ticket.cancel()
        ticket.cancel()
        pieces = [first, *await collected(ticket)]
        await until(lambda: running.engine.stats().running + running.engine.stats().waiting == 0)
        ticket.cancel()  # after the end: nothing
        return pieces

    pieces = running.run(scenario())
    assert pieces[-1].finish == "cancelled"
    assert len(ids_of(pieces)) < 400


def test_cancelling_before_the_first_token(running):
    async def scenario() -> list[Piece]:
        ticket = running.engine.submit(Work(PROMPT, BASE, LONG))
        ticket.cancel()
        return await asyncio.wait_for(collected(ticket), 20)

    assert running.run(scenario())[-1].finish == "cancelled"


def test_cancelling_leaves_others_alone(running, slow):
    alone = ids_of(running.answer(choice=ONE))

    async def scenario() -> list[list[Piece]]:
        hung_up = [running.engine.submit(Work((*PROMPT, n), MIX, LONG)) for n in range(4)]
        staying = [asyncio.create_task(answered(running.engine, Work(PROMPT, ONE, GREEDY))) for _ in range(3)]
        await anext(hung_up[0])
        for ticket in hung_up:
            ticket.cancel()
        return await asyncio.gather(*staying)

    assert [ids_of(pieces) for pieces in running.run(scenario())] == [alone] * 3


def test_a_deadline_ends_the_answer(running, slow):
    began = time.monotonic()
    pieces = running.run(answered(running.engine, Work(PROMPT, ONE, LONG, deadline=began + 0.3)))
    assert pieces[-1].finish in ("timeout", "length")
    assert pieces[-1].finish == "timeout" or len(ids_of(pieces)) == 400
    assert time.monotonic() - began < 10


def test_a_deadline_that_has_passed(running):
    pieces = running.run(answered(running.engine, Work(PROMPT, BASE, LONG, deadline=time.monotonic() - 1)))
    assert pieces[-1].finish == "timeout"


def test_too_long(running):
    async def submit(ids: tuple[int, ...], most: int) -> Ticket:
        return running.engine.submit(Work(ids, BASE, Sampling(most)))

    with pytest.raises(TooLong, match="512"):
        running.run(submit(tuple(range(100, 600)), 20))
    fits = running.run(answered(running.engine, Work((9,) * 500, BASE, replace(GREEDY, max_tokens=12))))
    assert len(ids_of(fits)) == 12


def test_unknown_adapters(running):
    async def submit(choice: Choice) -> Ticket:
        return running.engine.submit(Work(PROMPT, choice, GREEDY))

    for choice in ((("cc" * 32, 1.0),), ((A, 0.5), ("cc" * 32, 0.5))):
        with pytest.raises(UnknownAdapter):
            running.run(submit(choice))
    with pytest.raises(UnknownAdapter):
        running.run(running.engine.unload("cc" * 32))


def test_loading_again_reads_nothing(running):
    again = ValueSource("adapter-1", engine_cases.made(1))
    running.run(running.engine.load(A, again))
    assert again.reads == 0


def test_pins_are_kept_or_refused(running):
    source = ValueSource("pinned", engine_cases.made(9))
    if not running.case.pins:
        with pytest.raises(Cannot, match="pin"):
            running.run(running.engine.load("99" * 32, source, pin=True))
        return
    running.run(running.engine.load("99" * 32, source, pin=True))
    running.run(running.engine.load("99" * 32, source))
    assert source.reads == 1
    running.run(running.engine.unload("99" * 32))


def test_a_failed_load_changes_nothing(running, slow):
    alone = ids_of(running.answer(choice=ONE))
    broken = ValueSource("broken", engine_cases.made(3), fails="the file changed")

    async def scenario() -> list[Piece]:
        task = asyncio.create_task(answered(running.engine, Work(PROMPT, ONE, GREEDY)))
        with pytest.raises(AdapterError, match="the file changed"):
            await running.engine.load("dd" * 32, broken)
        with pytest.raises(UnknownAdapter):
            running.engine.submit(Work(PROMPT, (("dd" * 32, 1.0),), GREEDY))
        return await task

    assert ids_of(running.run(scenario())) == alone
    broken.fails = None
    running.run(running.engine.load("dd" * 32, broken))  # mended: loads
    assert running.run(running.engine.unload("dd" * 32)) > 0


@pytest.mark.parametrize("wrong", [{"ending": "o_pro"}, {"width": 100}])
def test_adapters_that_do_not_fit_are_refused_by_name(running, wrong):
    if not running.case.checks:
        pytest.skip("this engine has no base")
    with pytest.raises(LorakitError, match="o_pro"):
        running.run(running.engine.load("ee" * 32, ValueSource("wrong", engine_cases.made(4, **wrong))))


def test_loading_at_once_reads_once(running):
    source = ValueSource("adapter-5", engine_cases.made(5))

    async def scenario() -> None:
        await asyncio.gather(*(running.engine.load("55" * 32, source) for _ in range(3)))

    running.run(scenario())
    if running.case.checks:
        assert source.reads == 1
    running.run(running.engine.unload("55" * 32))


def test_unloading_waits_for_requests_and_refuses_new_ones(running, slow):
    key = "ff" * 32
    running.run(running.engine.load(key, ValueSource("leaving", engine_cases.made(6))))
    alone = ids_of(running.answer(choice=((key, 1.0),)))

    async def scenario() -> tuple[list[Piece], int]:
        task = asyncio.create_task(answered(running.engine, Work(PROMPT, ((key, 1.0),), GREEDY)))
        await asyncio.sleep(0)
        await until(lambda: running.engine.stats().running + running.engine.stats().waiting > 0)
        unloading = asyncio.create_task(running.engine.unload(key))
        await asyncio.sleep(0.05)
        with pytest.raises(UnknownAdapter):
            running.engine.submit(Work(PROMPT, ((key, 1.0),), GREEDY))
        pieces = await task
        return pieces, await asyncio.wait_for(unloading, 20)

    pieces, freed = running.run(scenario())
    assert ids_of(pieces) == alone
    assert freed > 0
    running.run(running.engine.load(key, ValueSource("back", engine_cases.made(6))))
    assert ids_of(running.answer(choice=((key, 1.0),))) == alone
    running.run(running.engine.unload(key))


def test_stats_count(running):
    before = running.engine.stats()
    running.answer()
    after = running.engine.stats()
    assert after.alive
    assert after.answer_tokens - before.answer_tokens == 12
    assert (after.running, after.waiting) == (0, 0)


def test_a_full_engine_refuses_with_a_time(running):
    """An engine of its own, with two places, which also shows what stopping does."""

    async def scenario() -> None:
        engine = running.case.engine(2)
        await engine.start()
        running.case.pace(engine, 0.02)
        try:
            tickets = [engine.submit(Work(PROMPT, BASE, LONG)) for _ in range(2)]
            with pytest.raises(Busy) as refused:
                submit_many(engine, tickets)
            assert 0 < refused.value.retry_after <= 600
            short = collected(tickets[0])
            tickets[0].cancel()
            await short
        finally:
            began = time.monotonic()
            await engine.stop(drain=0.2)
        assert time.monotonic() - began < 15
        rest = await asyncio.gather(*(collected(ticket) for ticket in tickets[1:]))
        assert {pieces[-1].finish for pieces in rest} <= {"cancelled", "length"}
        with pytest.raises((Busy, EngineFailed)):
            engine.submit(Work(PROMPT, BASE, GREEDY))

    running.run(scenario())


def test_stopping_lets_running_requests_end(running):
    async def scenario() -> list[Piece]:
        engine = running.case.engine(4)
        await engine.start()
        task = asyncio.create_task(answered(engine, Work(PROMPT, BASE, GREEDY)))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(engine.stop(drain=20))
        await asyncio.sleep(0)
        with pytest.raises(Stopping):
            engine.submit(Work(PROMPT, BASE, GREEDY))
        await stopping
        return await task

    pieces = running.run(scenario())
    assert (len(ids_of(pieces)), pieces[-1].finish) == (12, "length")
