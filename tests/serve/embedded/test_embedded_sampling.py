"""Sampling, schemas and starts of prompts through the running engine: each answer is the one its request gets alone."""

from __future__ import annotations

import asyncio
import copy
import json

import pytest
import tiny_lm
import torch
from embedded_parts import Held, adapters_for, answer, engine_for

from lorakit.serve.embedded.grammar import Grammars
from lorakit.serve.embedded.prefixes import Prefixes
from lorakit.serve.engine import Sampling, Work
from lorakit.serve.errors import Cannot

COLOURS = {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 1, "maxItems": 3}
KINDS = [
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.7, "top_p": 0.8, "seed": -1},
    {"temperature": 1.5, "top_k": 9, "seed": 2},
    {"temperature": 1.0, "min_p": 0.05, "frequency": 0.5, "repetition": 1.2, "seed": 0},
    {"temperature": 0.0, "logit_bias": ((40, 3.0),), "presence": 1.0},
    {"temperature": 1.0, "schema": json.dumps(COLOURS), "seed": 7},
]


@pytest.fixture(scope="module")
def parts():
    """A model with a vocabulary of bytes, and two adapters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=264, max_position_embeddings=128, initializer_range=0.3, **sizes)
    model = LlamaForCausalLM(config).float().eval()
    return model, adapters_for(model, 2)


def run(parts, scenario, **settings):
    model, adapters = parts

    async def started():
        engine = engine_for(copy.deepcopy(model), grammars=Grammars(tiny_lm.tokenizer()), **settings)
        await engine.start()
        for key, adapter in adapters.items():
            await engine.load(key, Held(adapter))
        try:
            return await asyncio.wait_for(scenario(engine), 60)
        finally:
            await engine.stop(1)

    return asyncio.run(started())


def requests():
    choices = [(), (("key0", 1.0),), (("key1", 1.0),), (("key0", 0.5), ("key1", 0.5))]
    return [(list(range(3, 20 + n)), choices[n % 4], kind) for n, kind in enumerate(KINDS * 2)]


def test_sampled_answers_do_not_depend_on_what_else_is_running(parts):
    async def one_by_one(engine):
        return [await answer(engine, ids, choice, 16, **kind) for ids, choice, kind in requests()]

    async def at_once(engine):
        return await asyncio.gather(*(answer(engine, ids, choice, 16, **kind) for ids, choice, kind in requests()))

    alone = run(parts, one_by_one, prefixes=Prefixes(0))
    together = run(parts, at_once, rows=7)
    assert [ids for ids, *_ in together] == [ids for ids, *_ in alone]
    assert len({tuple(ids) for ids, *_ in alone}) > 8


def test_schemas_hold_whatever_the_adapter(parts):
    async def scenario(engine):
        schema = json.dumps(COLOURS)
        kinds = [{"schema": schema, "seed": n, "temperature": 0.0 if n % 2 else 1.0} for n in range(6)]
        choices = [(), (("key0", 1.0),), (("key1", 1.0),)]
        jobs = [answer(engine, [5, 6, 7], choices[n % 3], 60, **kind) for n, kind in enumerate(kinds)]
        return await asyncio.gather(*jobs)

    for ids, finish, _ in run(parts, scenario):
        assert finish == "stop"
        value = json.loads(tiny_lm.tokenizer().decode(ids))
        assert 1 <= len(value) <= 3
        assert set(value) <= {"red", "green"}


def test_a_schema_that_does_not_work_ends_its_own_request(parts):
    async def scenario(engine):
        bad = answer(engine, [5, 6, 7], schema='{"not": {}}')
        return await asyncio.gather(bad, answer(engine, [5, 6, 7]), return_exceptions=True)

    error, (ids, finish, _) = run(parts, scenario)
    assert isinstance(error, Cannot)
    assert error.what == "schema"
    assert (len(ids), finish) == (12, "length")


def test_settings_out_of_range_are_refused_before_they_get_a_row(parts):
    async def scenario(engine):
        for settings in ({"logit_bias": ((264, 1.0),)}, {"top_p": 2.0}):
            with pytest.raises(Cannot, match=next(iter(settings))):
                engine.submit(Work((5, 6), (), Sampling(4, **settings)))
        return await answer(engine, [5, 6])

    assert run(parts, scenario)[1] == "length"


def test_each_token_has_its_logprobs(parts):
    async def scenario(engine):
        ticket = engine.submit(Work((5, 6, 7), (), Sampling(5, temperature=0.0, logprobs=2)))
        return [piece async for piece in ticket]

    pieces = run(parts, scenario)
    model = parts[0]
    ids = [5, 6, 7]
    for report in (report for piece in pieces for report in piece.logprobs):
        with torch.no_grad():
            exact = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        assert report.id == int(exact.argmax())
        assert report.logprob == pytest.approx(float(exact.max()), abs=1e-4)
        assert [token for token, _ in report.alternatives] == exact.topk(2).indices.tolist()
        ids.append(report.id)
    assert len(ids) == 8


def test_the_next_turn_of_a_chat_computes_only_what_is_new(parts):
    prompt = list(range(10, 40))

    async def scenario(engine):
        ids, _, first = await answer(engine, prompt, (("key0", 1.0),), 24)
        turn = [*prompt, *ids, 3, 4, 5]
        again = await answer(engine, turn, (("key0", 1.0),), 8)
        other = await answer(engine, turn, (("key1", 1.0),), 8)
        return first, again, other, turn

    first, (ids, _, cached), (_, _, cached_by_another), turn = run(parts, scenario)
    assert (first, cached_by_another) == (0, 0)
    assert cached >= len(prompt) + 23  # the answer's last token was never computed
    fresh = run(parts, lambda engine: answer(engine, turn, (("key0", 1.0),), 8), prefixes=Prefixes(0))
    assert ids == fresh[0]
