"""What ends a request of the embedded engine early, and that nobody else notices."""

from __future__ import annotations

import asyncio
import copy
import threading
import time

import pytest
import tiny
from embedded_parts import IDS, adapters_for, all_alone, alone, answer, engine_for, greedy_work, read, run_engine

from lorakit.serve.embedded.prefill import Group
from lorakit.serve.embedded.prefixes import Prefixes
from lorakit.serve.errors import Busy, Cannot, EngineFailed, Stopping, TooLong, UnknownAdapter


def test_a_cancelled_request_frees_its_row_and_the_others_go_on():
    async def scenario(engine):
        ticket = engine.submit(greedy_work(tokens=28))
        other = asyncio.create_task(answer(engine, (7, 8), (), 20))
        await anext(ticket)
        ticket.cancel()
        finish = (await read(ticket))[1]
        waited = await answer(engine, (4,), (), 5)  # gets the only row that can be free
        return finish, await other, waited

    finish, other, waited = run_engine(scenario, rows=2)
    assert finish == "cancelled"
    model = tiny.llama()
    assert other[0] == alone(model, {}, (7, 8), (), 20)
    assert waited[0] == alone(model, {}, (4,), (), 5)


def test_cancelled_while_it_waits_and_while_its_prompt_is_computed(monkeypatch):
    monkeypatch.setattr("lorakit.serve.embedded.prefill.LEAST", 1)
    monkeypatch.setattr("lorakit.serve.embedded.prefill.MOST", 1)

    async def scenario(engine):
        engine.tiers.known.add("slow")
        engine.tiers.blocked.add("slow")
        waiting = engine.submit(greedy_work(choice=(("slow", 1.0),)))
        prompt = engine.submit(greedy_work(ids=range(1, 25), tokens=2))
        also = asyncio.create_task(answer(engine, range(2, 26), (), 2))
        await asyncio.sleep(0.005)
        waiting.cancel()
        prompt.cancel()
        return (await read(waiting))[1], (await read(prompt))[1], (await also)[0]

    first, second, third = run_engine(scenario)
    assert first == "cancelled"
    assert second in ("cancelled", "length")  # the machine may be quick
    assert third == alone(tiny.llama(), {}, range(2, 26), (), 2)


def test_deadlines_end_what_waits_and_what_runs():
    async def scenario(engine):
        engine.tiers.known.add("slow")
        engine.tiers.blocked.add("slow")
        waits = engine.submit(greedy_work(choice=(("slow", 1.0),), deadline=time.monotonic() + 0.05))
        past = engine.submit(greedy_work(deadline=time.monotonic() - 1))
        return await read(waits), await read(past), await answer(engine, IDS)

    waits, past, fine = run_engine(scenario)
    assert waits == ([], "timeout", 0) == past
    assert fine[1] == "length"


def test_adapters_that_are_not_ready_hold_up_nobody_else():
    base = tiny.llama()
    adapters = adapters_for(base, 2)

    async def scenario(engine):
        engine.tiers.blocked.add("key0")
        late = [asyncio.create_task(answer(engine, IDS, (("key0", 1.0),))) for _ in range(3)]
        soon = [await answer(engine, IDS, (("key1", 1.0),)), await answer(engine, IDS)]
        assert not any(task.done() for task in late)
        engine.tiers.blocked.clear()
        engine.tiers.wake()
        return soon, [await task for task in late]

    soon, late = run_engine(scenario, copy.deepcopy(base), adapters, rows=2)
    expected = all_alone(base, adapters, [(IDS, (("key1", 1.0),), 12), (IDS, (), 12), (IDS, (("key0", 1.0),), 12)])
    assert [ids for ids, *_ in soon] == expected[:2]
    assert [ids for ids, *_ in late] == [expected[2]] * 3


def test_requests_beyond_rows_and_queue_are_refused_with_a_time_to_ask_again():
    async def scenario(engine):
        tickets = [engine.submit(greedy_work(tokens=20)) for _ in range(3)]
        with pytest.raises(Busy, match="1 rows are taken and 2 requests wait") as busy:
            engine.submit(greedy_work())
        answers = [await read(ticket) for ticket in tickets]
        assert len(await answer(engine, IDS)) == 3  # there is room again
        return busy.value.retry_after, answers

    after, answers = run_engine(scenario, rows=1, waiting=2)
    assert 0 < after <= 60
    assert [len(ids) for ids, *_ in answers] == [20] * 3


@pytest.mark.parametrize(
    ("work", "kind", "says"),
    [
        (greedy_work(ids=()), Cannot, "the prompt is empty"),
        (greedy_work(ids=(1, 99)), Cannot, "token 99; the base has tokens 0 to 47"),
        (greedy_work(ids=(-1,)), Cannot, "token -1"),
        (greedy_work(tokens=0), Cannot, "max_tokens is 0"),
        (greedy_work(tokens=30), TooLong, "lower max_tokens to 29"),
        (greedy_work(choice=(("nobody", 1.0),)), UnknownAdapter, "nobody"),
        (greedy_work(logprobs=21), Cannot, "up to 20"),
        (greedy_work(schema="{}"), Cannot, "grammars"),
    ],
)
def test_what_cannot_be_done_is_refused_before_it_is_queued(work, kind, says):
    async def scenario(engine):
        with pytest.raises(kind, match=says):
            engine.submit(work)
        return engine.stats()

    assert run_engine(scenario).waiting == 0


def test_the_context_can_be_filled_to_its_last_position():
    async def scenario(engine):
        assert engine.facts.context == 32
        return await answer(engine, IDS, (), 29)

    assert run_engine(scenario)[0] == alone(tiny.llama(), {}, IDS, (), 29)


def test_equal_choices_are_one_choice_whatever_their_order():
    base = tiny.llama()
    adapters = adapters_for(base, 2)
    prompt = tuple(range(1, 20))

    async def scenario(engine):
        first = await answer(engine, prompt, (("key0", 0.6), ("key1", 0.4)), 4)
        second = await answer(engine, prompt, (("key1", 0.4), ("key0", 0.3), ("key0", 0.3)), 4)
        zero = await answer(engine, prompt, (("key1", 0.0),), 4)
        return first, second, zero

    first, second, zero = run_engine(scenario, copy.deepcopy(base), adapters)
    assert first[0] == second[0]
    assert (first[2], second[2]) == (0, len(prompt) - 1)
    assert zero[0] == alone(base, {}, prompt, (), 4)


def test_stop_drains_then_cancels_and_refuses_new_work():
    async def scenario():
        engine = engine_for(tiny.llama(), rows=1)
        await engine.start()
        engine.tiers.known.add("never")
        engine.tiers.blocked.add("never")
        runs, waits = engine.submit(greedy_work()), engine.submit(greedy_work(choice=(("never", 1.0),)))
        stopping = asyncio.create_task(engine.stop(0.3))
        await asyncio.sleep(0.01)
        with pytest.raises(Stopping, match="stopping"):
            engine.submit(greedy_work())
        finished = await read(runs), await read(waits)
        await stopping
        assert engine.tiers.closed
        with pytest.raises(EngineFailed, match="not running"):
            engine.submit(greedy_work())
        await engine.stop(1)  # twice is once
        return finished

    runs, waits = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert (len(runs[0]), runs[1]) == (12, "length")
    assert waits[1] == "cancelled"


def test_stats_count_tokens_and_what_was_cached():
    prompt = tuple(range(1, 22))

    async def scenario(engine):
        await answer(engine, prompt, (), 5)
        await answer(engine, prompt, (), 5)
        return engine.stats()

    stats = run_engine(scenario)
    assert (stats.prompt_tokens, stats.cached_tokens, stats.answer_tokens) == (42, 20, 10)
    assert (stats.running, stats.waiting, stats.alive) == (0, 0, True)
    assert stats.last_step is not None


def test_the_time_since_the_last_step_is_not_that_of_idleness(monkeypatch):
    """/health says by it whether the engine hangs. A prompt that is being computed is no step, but is progress."""
    monkeypatch.setattr("lorakit.serve.embedded.prefill.LEAST", 1)
    monkeypatch.setattr("lorakit.serve.embedded.prefill.MOST", 4)
    release, seen = threading.Event(), []
    real = Group.advance

    def advance(self, runner, tokens):
        seen.append(counters[0].last_step)
        release.wait(30)
        time.sleep(0.002)
        return real(self, runner, tokens)

    monkeypatch.setattr(Group, "advance", advance)
    counters = []

    async def scenario(engine):
        counters.append(engine._loop.counters)
        assert engine.stats().last_step is None
        counters[0].last_step = time.monotonic() - 3600  # as after an hour without requests
        asking = asyncio.create_task(answer(engine, range(1, 25), (), 2))
        while not seen:
            await asyncio.sleep(0.01)
        during = engine.stats()
        release.set()
        await asking
        return during

    during = run_engine(scenario)
    assert during.running == 1
    assert time.monotonic() - during.last_step < 60
    assert len(seen) > 2
    assert seen == sorted(set(seen))  # later with each chunk


def test_a_long_prompt_is_fed_in_chunks_between_the_steps_of_others(monkeypatch):
    monkeypatch.setattr("lorakit.serve.embedded.prefill.LEAST", 2)
    monkeypatch.setattr("lorakit.serve.embedded.prefill.MOST", 2)
    happened = []

    async def scenario(engine):
        for name in ("prefill", "step"):
            real = getattr(engine.runner, name)
            setattr(engine.runner, name, lambda *a, n=name, real=real: (happened.append(n), real(*a))[1])
        running = engine.submit(greedy_work(tokens=28))
        await anext(running)
        happened.clear()
        long = await answer(engine, range(1, 22), (), 3)
        return long[0], await read(running)

    long, _ = run_engine(scenario)
    assert long == alone(tiny.llama(), {}, range(1, 22), (), 3)
    prompt = [at for at, name in enumerate(happened) if name == "prefill"]
    assert len(prompt) == 10  # two tokens each, of 20
    assert all(happened[at + 1] == "step" for at in prompt)


def test_the_pace_of_prompts_bounds_a_chunk():
    from lorakit.serve.embedded.prefill import FIRST, LEAST, MOST, Pace

    pace = Pace()
    assert pace.tokens(0.1) == FIRST
    pace.saw(LEAST - 1, 100.0)  # too few to tell
    assert pace.tokens(0.1) == FIRST
    pace.saw(1000, 1.0)
    assert pace.tokens(0.1) == 100
    assert pace.tokens(0.001) == LEAST
    assert pace.tokens(10.0) == MOST


def test_equal_prompts_are_computed_once_whoever_of_them_hangs_up(monkeypatch):
    monkeypatch.setattr("lorakit.serve.embedded.prefill.LEAST", 1)
    monkeypatch.setattr("lorakit.serve.embedded.prefill.LEAST", 1)
    monkeypatch.setattr("lorakit.serve.embedded.prefill.MOST", 4)
    prompt = tuple(range(1, 18))
    fed = []

    async def scenario(engine):
        prefill = engine.runner.prefill

        def noted(slots, ids):
            fed.append((len(ids), len(ids[0])))
            if len(fed) == 2:  # while the prompt is being computed
                tickets[0].cancel()
            prefill(slots, ids)

        engine.runner.prefill = noted
        tickets = [engine.submit(greedy_work(prompt, tokens=5)) for _ in range(4)]
        return await asyncio.gather(*(read(ticket) for ticket in tickets))

    answers = run_engine(scenario, prefixes=Prefixes(0), rows=4)
    assert sum(rows * width for rows, width in fed) == len(prompt) - 1
    assert answers[0][1] == "cancelled"
    for ids, finish, cached in answers[1:]:
        assert (ids, finish) == (alone(tiny.llama(), {}, prompt, (), 5), "length")
        assert cached == len(prompt) - 1


def test_fifty_that_hang_up_leave_all_rows_free():
    base = tiny.llama()
    adapters = adapters_for(base, 2)
    mixes = [(), (("key0", 1.0),), (("key1", 0.5),)]

    async def scenario(engine):
        async def hangs_up(n):
            ticket = engine.submit(greedy_work(range(1, 2 + n % 20), mixes[n % 3], 10))
            for _ in range(n % 4):
                await anext(ticket)
            ticket.cancel()
            return (await read(ticket))[1]

        ends = await asyncio.gather(*(hangs_up(n) for n in range(50)))
        jobs = [(tuple(range(3, 9 + n)), mixes[n % 3], 6) for n in range(9)]
        got = await asyncio.gather(*(answer(engine, *job) for job in jobs))
        assert [ids for ids, *_ in got] == all_alone(base, adapters, jobs)
        assert engine.stats().running == 0
        return ends

    ends = run_engine(scenario, copy.deepcopy(base), adapters, rows=3)
    assert set(ends) == {"cancelled"}


def test_an_engine_starts_once():
    async def scenario(engine):
        with pytest.raises(EngineFailed, match="started before"):
            await engine.start()

    run_engine(scenario)
