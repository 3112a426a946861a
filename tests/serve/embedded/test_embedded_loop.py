"""What ends a request of the embedded engine early, and that nobody else notices."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from types import SimpleNamespace

import pytest
import tiny
import torch
from embedded_parts import Held, adapters_for, all_alone, alone, answer, engine_for, read

from lorakit.errors import AdapterError, LorakitError
from lorakit.serve.embedded.grammar import Grammars
from lorakit.serve.embedded.prefill import Group
from lorakit.serve.embedded.prefixes import Prefixes
from lorakit.serve.engine import Sampling, Work
from lorakit.serve.errors import Busy, Cannot, EngineFailed, Stopping, TooLong, UnknownAdapter

IDS = (5, 9, 11)


def greedy_work(ids=IDS, choice=(), tokens=12, deadline=None, **sampling):
    return Work(tuple(ids), choice, Sampling(tokens, **{"temperature": 0.0, **sampling}), deadline)


def run(scenario, model=None, adapters=None, **settings):
    """Run `scenario(engine)` on a started engine, and check that nothing is held in the end."""

    async def all_of_it():
        engine = engine_for(tiny.llama() if model is None else model, **settings)
        await engine.start()
        for key, adapter in (adapters or {}).items():
            await engine.load(key, Held(adapter))
        result = await scenario(engine)
        await engine.stop(5)
        assert not engine.tiers.held
        return result

    return asyncio.run(asyncio.wait_for(all_of_it(), 60))


def test_a_cancelled_request_frees_its_row_and_the_others_go_on():
    async def scenario(engine):
        ticket = engine.submit(greedy_work(tokens=28))
        other = asyncio.create_task(answer(engine, (7, 8), (), 20))
        await anext(ticket)
        ticket.cancel()
        finish = (await read(ticket))[1]
        waited = await answer(engine, (4,), (), 5)  # gets the only row that can be free
        return finish, await other, waited

    finish, other, waited = run(scenario, rows=2)
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

    first, second, third = run(scenario)
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

    waits, past, fine = run(scenario)
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

    soon, late = run(scenario, copy.deepcopy(base), adapters, rows=2)
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

    after, answers = run(scenario, rows=1, waiting=2)
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

    assert run(scenario).waiting == 0


def test_the_context_can_be_filled_to_its_last_position():
    async def scenario(engine):
        assert engine.facts.context == 32
        return await answer(engine, IDS, (), 29)

    assert run(scenario)[0] == alone(tiny.llama(), {}, IDS, (), 29)


def failing(engine, name, error, times=1):
    """Let a method of the engine's runner raise, `times` times."""
    real, left = getattr(engine.runner, name), [times]

    def broken(*args):
        if left[0]:
            left[0] -= 1
            raise error
        return real(*args)

    setattr(engine.runner, name, broken)


def test_an_error_in_a_step_ends_its_rows_and_the_engine_goes_on():
    async def scenario(engine):
        failing(engine, "step", RuntimeError("a kernel broke"))
        both = await asyncio.gather(answer(engine, IDS), answer(engine, (7, 8)), return_exceptions=True)
        return both, await answer(engine, IDS)

    both, after = run(scenario)
    for error in both:
        assert isinstance(error, EngineFailed)
        assert error.heals
        assert "a kernel broke" in str(error)
    assert after[0] == alone(tiny.llama(), {}, IDS)


def test_an_error_before_the_first_token_ends_its_request_alone(monkeypatch):
    async def scenario(engine):
        running = engine.submit(greedy_work(tokens=25))
        first = await anext(running)
        for name in ("find", "keep"):
            real = getattr(engine.prefixes, name)
            monkeypatch.setattr(engine.prefixes, name, lambda *_: (_ for _ in ()).throw(RuntimeError("no room")))
            if name == "find":
                with pytest.raises(EngineFailed, match="no room"):
                    await answer(engine, range(1, 20), (), 3)
            else:
                assert (await answer(engine, range(1, 20), (), 3))[1] == "length"  # what is not kept is no error
            monkeypatch.setattr(engine.prefixes, name, real)
        with monkeypatch.context() as patch:
            patch.setattr("lorakit.serve.embedded.loop.Picking", lambda *_: 1 / 0)
            with pytest.raises(EngineFailed, match="ZeroDivisionError"):
                await answer(engine, IDS)
        return list(first.ids) + (await read(running))[0]

    assert run(scenario) == alone(tiny.llama(), {}, IDS, (), 25)


def test_an_error_in_a_prompt_ends_no_answer_that_runs():
    async def scenario(engine):
        running = engine.submit(greedy_work(tokens=25))
        first = await anext(running)
        failing(engine, "prefill", torch.OutOfMemoryError("no more"))
        with pytest.raises(EngineFailed, match="out of memory"):
            await answer(engine, (1, 2, 3, 4))
        return list(first.ids) + (await read(running))[0]

    assert run(scenario) == alone(tiny.llama(), {}, IDS, (), 25)


def test_values_that_are_not_finite_end_their_own_row_alone():
    base = tiny.llama()
    adapters = adapters_for(base, 2)
    first = next(iter(adapters["key1"].updates.values()))
    next(iter(first.tensors().values())).fill_(3e38)  # finite, as NaN is refused at load
    jobs = [(tuple(range(1, n)), choice, 9) for n, choice in zip((5, 9, 4, 8), [(), (("key0", 1.0),)] * 2)]

    async def scenario(engine):
        bad = [answer(engine, range(1, n), (("key1", 1.0),)) for n in (3, 12)]
        got = await asyncio.gather(*(answer(engine, *job) for job in jobs), *bad, return_exceptions=True)
        again = await asyncio.gather(*(answer(engine, *job) for job in jobs))  # in the rows of the broken ones
        return got, again

    got, again = run(scenario, copy.deepcopy(base), adapters, rows=6, prefixes=Prefixes(0))
    expected = all_alone(base, adapters, jobs)
    assert [a[0] for a in got[:4]] == expected
    assert [a[0] for a in again] == expected
    for error in got[4:]:
        assert isinstance(error, EngineFailed)
        assert not error.heals


def test_a_scaled_saved_module_is_refused_and_its_neighbours_go_on():
    base = tiny.llama()
    adapters = adapters_for(base, 1, save_modules=["lm_head"])

    async def scenario(engine):
        return await asyncio.gather(
            answer(engine, IDS, (("key0", 0.5),)),
            answer(engine, IDS, (("key0", 1.0),)),
            answer(engine, IDS),
            return_exceptions=True,
        )

    refused, whole, plain = run(scenario, copy.deepcopy(base), adapters)
    assert isinstance(refused, Cannot)
    assert refused.what == "scale"
    assert [whole[0], plain[0]] == all_alone(base, adapters, [(IDS, (("key0", 1.0),), 12), (IDS, (), 12)])


def test_an_adapter_that_cannot_be_read_any_more_ends_its_requests():
    async def scenario(engine):
        engine.tiers.known.add("gone")
        ready = engine.tiers.ready

        def asked(keys):
            if "gone" in keys:
                raise AdapterError("the file has changed")
            return ready(keys)

        engine.tiers.ready = asked
        with pytest.raises(AdapterError, match="has changed"):
            await answer(engine, IDS, (("gone", 1.0),))
        return await answer(engine, IDS)

    assert run(scenario)[1] == "length"


def test_equal_choices_are_one_choice_whatever_their_order():
    base = tiny.llama()
    adapters = adapters_for(base, 2)
    prompt = tuple(range(1, 20))

    async def scenario(engine):
        first = await answer(engine, prompt, (("key0", 0.6), ("key1", 0.4)), 4)
        second = await answer(engine, prompt, (("key1", 0.4), ("key0", 0.3), ("key0", 0.3)), 4)
        zero = await answer(engine, prompt, (("key1", 0.0),), 4)
        return first, second, zero

    first, second, zero = run(scenario, copy.deepcopy(base), adapters)
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


def test_a_dead_thread_is_said_by_stats_and_every_call():
    async def scenario():
        engine = engine_for(tiny.llama())
        await engine.start()

        def dies():
            raise ZeroDivisionError("a mistake")

        engine.tiers.between_steps = dies
        ticket = engine.submit(greedy_work())
        with pytest.raises(EngineFailed, match="a mistake") as failed:
            await read(ticket)
        assert not failed.value.heals
        assert not engine.stats().alive
        with pytest.raises(EngineFailed):
            engine.submit(greedy_work())
        await engine.stop(1)

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_stats_count_tokens_and_what_was_cached():
    prompt = tuple(range(1, 22))

    async def scenario(engine):
        await answer(engine, prompt, (), 5)
        await answer(engine, prompt, (), 5)
        return engine.stats()

    stats = run(scenario)
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

    during = run(scenario)
    assert during.running == 1
    assert time.monotonic() - during.last_step < 60
    assert len(seen) > 2
    assert seen == sorted(set(seen))  # later with each chunk


def test_a_grammar_is_compiled_outside_the_threads_and_its_errors_come_out_of_the_ticket():
    class Refusing:
        async def compiled(self, schema):
            raise Cannot(f"no {schema}", "schema")

        def close(self):
            pass

    async def scenario(engine):
        assert "schema" in engine.facts.can
        with pytest.raises(Cannot, match="no x"):
            await answer(engine, IDS, (), 4, schema="x")
        return await answer(engine, IDS)

    assert run(scenario, grammars=Refusing())[1] == "length"


class SlowGrammars(Grammars):
    """Each schema takes a while to be refused."""

    def __init__(self):
        super().__init__(SimpleNamespace(eos_token_id=0))
        self.began: list[str] = []

    def matcher(self, schema):
        self.began.append(schema)
        time.sleep(0.4)
        raise Cannot(f"no {schema}", "schema")


def test_a_schema_is_not_compiled_for_those_who_have_hung_up():
    grammars = SlowGrammars()

    async def scenario(engine):
        for n in range(8):  # more than may be open at once
            ticket = engine.submit(greedy_work(schema=f"of hung up {n}"))
            ticket.cancel()
            assert (await read(ticket))[1] == "cancelled"
        with pytest.raises(Cannot, match="no honest"):
            await answer(engine, IDS, (), 3, schema="honest")

    run(scenario, grammars=grammars, rows=1, waiting=2)
    assert len(grammars.began) <= 3  # one that was begun is finished
    assert grammars.began[-1] == "honest"


def test_a_deadline_is_kept_while_a_schema_is_compiled():
    async def scenario(engine):
        began = time.monotonic()
        late = engine.submit(greedy_work(schema="late", deadline=began + 0.1))
        assert (await read(late))[1] == "timeout"
        return time.monotonic() - began

    assert 0.1 <= run(scenario, grammars=SlowGrammars()) < 0.35


def test_load_passes_on_what_the_tiers_refuse():
    async def scenario(engine):
        async def refuse(key, source, *, pin=False):
            raise LorakitError("not this one")

        engine.tiers.load = refuse
        with pytest.raises(LorakitError, match="not this one"):
            await engine.load("key", Held(None))

    run(scenario)


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

    long, _ = run(scenario)
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

    answers = run(scenario, prefixes=Prefixes(0), rows=4)
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

    ends = run(scenario, copy.deepcopy(base), adapters, rows=3)
    assert set(ends) == {"cancelled"}


def test_an_engine_starts_once():
    async def scenario(engine):
        with pytest.raises(EngineFailed, match="started before"):
            await engine.start()

    run(scenario)
