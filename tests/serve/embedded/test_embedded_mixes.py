"""A greedy answer is what `generate` gives with that request's adapters alone, whatever else is running."""

from __future__ import annotations

import asyncio
import copy
import itertools
import random

import pytest
import tiny
import torch
from architectures import VOCABULARY, causal_lm
from embedded_parts import Held, PlainTiers, adapters_for, all_alone, alone, answer, engine_for

import lorakit as lk
from lorakit.errors import StateError
from lorakit.serve.embedded.prefixes import Prefixes
from lorakit.serve.embedded.tiers import Tiers
from lorakit.serve.engine import Sampling, Work
from lorakit.serve.errors import EngineFailed

MIXES = [(), (("key0", 1.0),), (("key1", 1.0),), (("key2", 0.5),), (("key0", 0.6), ("key1", 0.4))]


def jobs_of(seed, number, longest=34):
    """Prompts of many lengths, some with the same start, for each mix in turn; with their numbers of new tokens."""
    draw = random.Random(seed)
    jobs = []
    for n in range(number):
        ids = [draw.randrange(1, VOCABULARY) for _ in range(draw.choice([1, 2, 5, 9, 14, 20, 30]))]
        if n % 5 == 4:
            ids = (jobs[n - 3][0] + ids)[:longest]
        jobs.append((ids, MIXES[n % len(MIXES)], draw.choice([3, 8, 15])))
    return jobs


async def served(engine, adapters, jobs, rounds=1):
    """Load the adapters, answer all jobs at once, `rounds` times, and stop."""
    await engine.start()
    for key, adapter in adapters.items():
        await engine.load(key, Held(adapter))
    answers = []
    for _ in range(rounds):
        answers.append(await asyncio.gather(*(answer(engine, *job) for job in jobs), return_exceptions=True))
    if isinstance(engine.tiers, PlainTiers):
        assert not engine.tiers.held
    await engine.stop(1)
    return answers


@pytest.mark.parametrize(
    "architecture",
    ["llama", "gpt2", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "mixtral", "deepseek_v3"],
)
def test_rows_at_any_mix_answer_as_each_adapter_alone(architecture):
    model = causal_lm(architecture)
    base, adapters, jobs = copy.deepcopy(model), adapters_for(model, 3), jobs_of(1, 10)
    expected = all_alone(base, adapters, jobs)
    first, second = asyncio.run(served(engine_for(model, rows=5), adapters, jobs, rounds=2))
    assert [ids for ids, *_ in first] == expected
    assert [ids for ids, *_ in second] == expected  # with starts of prompts that were kept
    assert sum(cached for *_, cached in second) > sum(cached for *_, cached in first)


def test_64_prompts_with_32_adapters_in_32_rows_answer_as_each_alone():
    model = causal_lm("llama", seed=5)
    base, adapters = copy.deepcopy(model), adapters_for(model, 32)
    choices = [(), *(((key, 1.0),) for key in adapters), (("key3", 0.7), ("key9", 0.3)), (("key3", -0.5),)]
    jobs = [(ids, choices[n % len(choices)], tokens) for n, (ids, _, tokens) in enumerate(jobs_of(2, 64))]
    (got,) = asyncio.run(served(engine_for(model, rows=32, prefixes=Prefixes(0)), adapters, jobs))
    assert [ids for ids, *_ in got] == all_alone(base, adapters, jobs)


def test_more_adapters_than_the_device_has_places_for():
    model = causal_lm("llama", seed=21)
    base, adapters = copy.deepcopy(model), adapters_for(model, 7)
    choices = [(), *(((key, 1.0),) for key in adapters), (("key1", 0.7), ("key5", 0.3))]
    jobs = [(ids, choices[n % len(choices)], tokens) for n, (ids, _, tokens) in enumerate(jobs_of(9, 36))]
    engine = engine_for(model, rows=8, tiers=Tiers(model, device=3, memory_bytes=1 << 20))
    (got,) = asyncio.run(served(engine, adapters, jobs))
    assert [ids for ids, *_ in got] == all_alone(base, adapters, jobs)
    assert engine.stats().evictions > 0


def test_shared_experts_that_get_the_tokens_of_all_rows_in_one_axis():
    model = causal_lm("qwen2_moe")
    base, adapters, jobs = copy.deepcopy(model), adapters_for(model, 3), jobs_of(3, 8)
    engine = engine_for(model, rows=5)
    (got,) = asyncio.run(served(engine, adapters, jobs))
    assert engine.runner.one_by_one
    assert [ids for ids, *_ in got] == all_alone(base, adapters, jobs)


def test_an_adapter_that_fails_in_a_prompt_does_not_make_all_others_run_one_by_one():
    model = causal_lm("llama", seed=3)
    base, adapters, jobs = copy.deepcopy(model), adapters_for(model, 3), jobs_of(6, 10)
    engine = engine_for(model, rows=8)
    feed, bad = engine.runner._feed, MIXES[2]

    def feeds(part, slots, ids, choices, per="row"):
        if part is engine.runner.body and bad in choices:
            raise StateError("this module cannot be routed")
        return feed(part, slots, ids, choices, per)

    engine.runner._feed = feeds
    (got,) = asyncio.run(served(engine, adapters, jobs))
    assert not engine.runner.one_by_one
    for job, found, expected in zip(jobs, got, all_alone(base, adapters, jobs), strict=True):
        if job[1] == bad and len(job[0]) > 1:
            assert isinstance(found, EngineFailed)
            assert "cannot be routed" in str(found)
        else:
            assert found[0] == expected


def test_ranks_from_1_to_256_in_one_batch():
    model = causal_lm("llama", seed=8)
    base = copy.deepcopy(model)
    adapters = {}
    for rank in (1, 3, 16, 64, 256):
        adapters[f"of{rank}"] = adapters_for(model, 1, rank=rank, size=0.3 / rank**0.25)["key0"]
    assert [adapter.config.rank for adapter in adapters.values()] == [1, 3, 16, 64, 256]
    choices = [(), *(((key, 1.0),) for key in adapters), (("of1", 0.5), ("of256", 0.5))]
    jobs = [(ids, choices[n % len(choices)], tokens) for n, (ids, _, tokens) in enumerate(jobs_of(7, 14))]
    engine = engine_for(model, rows=14, tiers=Tiers(model, device=8))
    (got,) = asyncio.run(served(engine, adapters, jobs))
    assert [ids for ids, *_ in got] == all_alone(base, adapters, jobs)


def test_one_long_prompt_to_each_choice_in_every_order_answers_as_a_cold_server():
    """Kept starts of prompts, and an adapter that was unloaded and loaded again, change nothing."""
    model = causal_lm("llama", seed=9)
    model.config.max_position_embeddings = 256
    base, adapters = copy.deepcopy(model), adapters_for(model, 2)
    draw = random.Random(4)
    ids = [draw.randrange(1, VOCABULARY) for _ in range(200)]
    choices = [(), (("key0", 1.0),), (("key1", 1.0),), (("key0", 0.6), ("key1", 0.4))]
    cold = {choice: alone(base, adapters, ids, choice, 5) for choice in choices}
    assert len({tuple(each) for each in cold.values()}) == 4

    async def go():
        engine = engine_for(model, tiers=Tiers(model, device=2))
        await engine.start()
        for key, adapter in adapters.items():
            await engine.load(key, Held(adapter))
        for number, order in enumerate(itertools.permutations(choices)):
            for at, choice in enumerate((*order, choices[1])):
                if at == number % 5:
                    await engine.unload("key0")
                    await engine.load("key0", Held(adapters["key0"]))
                assert (await answer(engine, ids, choice, 5))[0] == cold[choice], order
            engine._loop.prefixes = engine.prefixes = Prefixes(1 << 26)  # the next order begins without what was kept
        await engine.stop(1)

    asyncio.run(asyncio.wait_for(go(), 120))


def test_answers_are_those_of_real_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = causal_lm("llama", seed=7)
    base, adapters = copy.deepcopy(model), adapters_for(model, 2)
    jobs = [(ids, MIXES[1 + n % 2], 10) for n, (ids, _, _) in enumerate(jobs_of(4, 6))]
    (got,) = asyncio.run(served(engine_for(model, rows=4), adapters, jobs))
    theirs = None
    for key, adapter in adapters.items():
        adapter.save(tmp_path / key)
        if theirs is None:
            theirs = peft.PeftModel.from_pretrained(base, tmp_path / key, adapter_name=key)
        else:
            theirs.load_adapter(tmp_path / key, adapter_name=key)
    for (ids, choice, tokens), (ours, *_) in zip(jobs, got, strict=True):
        theirs.set_adapter(choice[0][0])
        out = theirs.generate(
            input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0
        )
        assert ours == out[0, len(ids) :].tolist()


def test_dora_biases_and_saved_modules_are_served_beside_plain_adapters():
    model = causal_lm("llama", seed=9)
    base = copy.deepcopy(model)
    adapters = adapters_for(model, 3)
    adapters["key1"] = adapters_for(model, 1, variant="dora")["key0"]
    adapters["key2"] = adapters_for(model, 1, save_modules=["lm_head", "norm"])["key0"]
    choices = [(), (("key0", 1.0),), (("key1", 1.0),), (("key2", 1.0),), (("key0", 0.4), ("key1", 0.6))]
    jobs = [(ids, choices[n % 5], tokens) for n, (ids, _, tokens) in enumerate(jobs_of(5, 10))]
    (got,) = asyncio.run(served(engine_for(model, rows=6), adapters, jobs))
    assert [ids for ids, *_ in got] == all_alone(base, adapters, jobs)


def test_adapters_that_come_and_go_while_others_answer():
    model = causal_lm("llama", seed=11)
    base, old = copy.deepcopy(model), adapters_for(model, 2)
    new = {"key2": adapters_for(model, 3)["key2"]}
    ids = list(range(1, 24))

    async def scenario():
        engine = engine_for(model, rows=4)
        await engine.start()
        await engine.load("key0", Held(old["key0"]))
        await engine.load("key1", Held(old["key1"]))
        running = [asyncio.create_task(answer(engine, ids, (("key0", 1.0),), 30)) for _ in range(2)]
        await asyncio.sleep(0.01)
        used = asyncio.create_task(answer(engine, ids, (("key1", 1.0),), 20))
        await asyncio.sleep(0.01)
        freed = asyncio.create_task(engine.unload("key1"))  # waits for the one that uses it
        await engine.load("key2", Held(new["key2"]))
        joined = await answer(engine, ids, (("key2", 1.0),), 12)
        await freed
        assert used.done()
        got = [(await task)[0] for task in (*running, used)]
        await engine.stop(1)
        return [*got, joined[0]]

    every = old | new
    assert asyncio.run(scenario()) == [
        alone(base, every, ids, (("key0", 1.0),), 30),
        alone(base, every, ids, (("key0", 1.0),), 30),
        alone(base, every, ids, (("key1", 1.0),), 20),
        alone(base, every, ids, (("key2", 1.0),), 12),
    ]


def test_long_prompts_in_chunks_do_not_change_answers_and_let_others_go_on(monkeypatch):
    monkeypatch.setattr("lorakit.serve.embedded.prefill.LEAST", 1)
    monkeypatch.setattr("lorakit.serve.embedded.prefill.MOST", 4)
    model = causal_lm("gemma3_text")
    base, adapters, jobs = copy.deepcopy(model), adapters_for(model, 3), jobs_of(6, 10)
    (got,) = asyncio.run(served(engine_for(model, rows=4), adapters, jobs))
    assert [ids for ids, *_ in got] == all_alone(base, adapters, jobs)


def test_rows_of_several_length_classes_move_and_join(monkeypatch):
    monkeypatch.setattr("lorakit.serve.embedded.batches.FIRST_LENGTH", 6)
    monkeypatch.setattr("lorakit.serve.embedded.batches.FACTOR", 2)
    model = causal_lm("llama", seed=13)
    base, adapters, jobs = copy.deepcopy(model), adapters_for(model, 3), jobs_of(7, 12)
    expected = all_alone(base, adapters, jobs)
    for cost in (-(1 << 40), 200, 1 << 30):  # never joined; sometimes; always
        monkeypatch.setattr("lorakit.serve.embedded.batches.CALL_BYTES", cost)
        engine = engine_for(copy.deepcopy(model), rows=6)
        engine.runner.bytes = 0
        (got,) = asyncio.run(served(engine, adapters, jobs))
        assert [ids for ids, *_ in got] == expected


def test_pieces_join_to_the_answer_and_only_the_last_has_a_finish():
    model = tiny.llama()

    async def pieces():
        engine = engine_for(model)
        await engine.start()
        ticket = engine.submit(Work((5, 9, 11), (), Sampling(8, temperature=0.0)))
        got = [piece async for piece in ticket]
        await engine.stop(1)
        return got

    got = asyncio.run(pieces())
    assert [token for piece in got for token in piece.ids] == alone(model, {}, (5, 9, 11), (), 8)
    assert [piece.finish for piece in got] == [None] * 7 + ["length"]


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it():
    model = tiny.llama()
    full = alone(model, {}, (5, 9, 11), (), 12)
    stop = full[4]

    async def scenario():
        engine = engine_for(model)
        await engine.start()
        ended = await answer(engine, (5, 9, 11), (), 12, stop_ids=frozenset({stop}))
        # the next turn of a chat finds prompt and answer
        ids = [5, 9, 11, *full[:8]]
        first = await answer(engine, ids, (), 17)
        asked = (*ids, *first[0], 7)
        turn = await answer(engine, asked, (), 3)
        await engine.stop(1)
        return ended, turn, asked

    (ids, finish, _), (turn, _, cached), asked = asyncio.run(scenario())
    assert (ids, finish) == (full[: full.index(stop)], "stop")
    assert turn == alone(model, {}, asked, (), 3)
    assert cached == len(asked) - 2  # all but the last token of the answer, which was not fed, and the new one


def test_sampled_answers_of_a_seed_do_not_depend_on_the_batch():
    model = causal_lm("llama", seed=3)
    settings = {"temperature": 1.0, "seed": 12, "top_p": 0.9}

    async def scenario():
        engine = engine_for(model, rows=8, prefixes=Prefixes(0))
        await engine.start()
        by_itself = await answer(engine, (3, 4, 5), (), 10, **settings)
        others = [answer(engine, [n + 1] * (n + 1), (), 12) for n in range(6)]
        crowd = await asyncio.gather(answer(engine, (3, 4, 5), (), 10, **settings), *others)
        await engine.stop(1)
        return by_itself, crowd[0]

    by_itself, crowded = asyncio.run(scenario())
    assert by_itself == crowded


def test_an_adapter_with_dropout_is_served_without(tmp_path):
    model = causal_lm("llama", seed=15)
    base = copy.deepcopy(model)
    adapters = adapters_for(model, 1, dropout=0.5)
    jobs = [([4, 8, 15, 16, 23], (("key0", 1.0),), 12)]
    (got,) = asyncio.run(served(engine_for(model), adapters, jobs))
    assert got[0][0] == alone(base, adapters, *jobs[0])
    assert lk.capture(model, "key0").config.dropout == 0.5
