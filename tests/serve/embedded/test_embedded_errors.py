"""Errors in the embedded engine: they end the requests that they are of, and nobody else's."""

from __future__ import annotations

import asyncio
import copy

import pytest
import tiny
import torch
from embedded_parts import IDS, Held, adapters_for, all_alone, alone, answer, engine_for, greedy_work, read, run_engine

from lorakit.errors import AdapterError, LorakitError
from lorakit.serve.embedded.prefixes import Prefixes
from lorakit.serve.errors import Cannot, EngineFailed


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

    both, after = run_engine(scenario)
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

    assert run_engine(scenario) == alone(tiny.llama(), {}, IDS, (), 25)


def test_an_error_in_a_prompt_ends_no_answer_that_runs():
    async def scenario(engine):
        running = engine.submit(greedy_work(tokens=25))
        first = await anext(running)
        failing(engine, "prefill", torch.OutOfMemoryError("no more"))
        with pytest.raises(EngineFailed, match="out of memory"):
            await answer(engine, (1, 2, 3, 4))
        return list(first.ids) + (await read(running))[0]

    assert run_engine(scenario) == alone(tiny.llama(), {}, IDS, (), 25)


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

    got, again = run_engine(scenario, copy.deepcopy(base), adapters, rows=6, prefixes=Prefixes(0))
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

    refused, whole, plain = run_engine(scenario, copy.deepcopy(base), adapters)
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

    assert run_engine(scenario)[1] == "length"


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


def test_load_passes_on_what_the_tiers_refuse():
    async def scenario(engine):
        async def refuse(key, source, *, pin=False):
            raise LorakitError("not this one")

        engine.tiers.load = refuse
        with pytest.raises(LorakitError, match="not this one"):
            await engine.load("key", Held(None))

    run_engine(scenario)
