"""The registry above the embedded engine: names answer what their files answer alone, over reloads, and what does not
fit is refused by name.
"""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import tiny
from embedded_parts import adapters_for, alone, answer, read
from served_adapters import registry

import lorakit as lk
from lorakit.errors import AdapterError
from lorakit.serve.embedded.engine import EmbeddedEngine
from lorakit.serve.embedded.prefixes import Prefixes
from lorakit.serve.embedded.tiers import Tiers
from lorakit.serve.engine import Sampling, Work

IDS = (3, 14, 15, 9, 26, 5)


@pytest.fixture(scope="module")
def base():
    model = tiny.llama()
    model.generation_config.eos_token_id = None  # which `alone` would keep out of its answers
    return model


@contextlib.asynccontextmanager
async def running(root, device=2):
    """An engine on the base with places for `device` adapters, and a registry of the adapters below the root."""
    model = tiny.llama()
    engine = EmbeddedEngine(
        model, base="tiny", tiers=Tiers(model, device=device, memory_bytes=1), prefixes=Prefixes(1 << 20)
    )
    engine.facts = await engine.start()
    made = registry(engine, root)
    try:
        await made.start()
        yield engine, made
    finally:
        await engine.stop(0)
        await made.close()


async def ask(engine, made, model, tokens=12):
    async with made.lease(model, None) as leased:
        return (await answer(engine, IDS, leased.choice, tokens))[0]


def test_every_name_answers_as_its_adapter_alone(base, tmp_path):
    """Six adapters, two of them on the device at once and none kept in memory: sources are read again."""
    adapters = adapters_for(base, 6)
    for key, adapter in adapters.items():
        adapter.save(tmp_path / key)
    wanted = {key: alone(base, adapters, IDS, ((key, 1.0),)) for key in adapters}
    mixes = {"key0:0.5+key1:0.25": (("key0", 0.5), ("key1", 0.25)), "key2:-1": (("key2", -1.0),), "base": ()}
    wanted |= {model: alone(base, adapters, IDS, choice) for model, choice in mixes.items()}

    async def scenario():
        async with running(tmp_path) as (engine, made):
            for _ in range(2):
                got = await asyncio.gather(*(ask(engine, made, model) for model in wanted))
                assert dict(zip(wanted, got, strict=True)) == wanted

    asyncio.run(scenario())


def test_a_name_that_is_replaced_answers_anew_and_running_answers_go_on(base, tmp_path):
    adapters = adapters_for(base, 2)
    adapters["key0"].save(tmp_path / "policy")
    old, new = (alone(base, adapters, IDS, ((key, 1.0),), 20) for key in adapters)
    assert old != new

    async def scenario():
        async with running(tmp_path) as (engine, made):
            assert await ask(engine, made, "policy", 20) == old
            async with made.lease("policy", None) as leased:
                ticket = engine.submit(Work(IDS, leased.choice, Sampling(20, temperature=0.0)))
                adapters["key1"].save(tmp_path / "policy")
                await made.load("policy", "policy", in_place=True)
                assert await ask(engine, made, "policy", 20) == new  # same prompt: no cached prefix of the old one
                assert (await read(ticket))[0] == old
            await made.versions.close()
            assert engine.stats().on_device == 1

    asyncio.run(scenario())


def test_what_does_not_fit_is_refused_by_name_and_the_others_answer_on(base, tmp_path):
    adapters = adapters_for(base, 1)
    adapters["key0"].save(tmp_path / "good")
    update = adapters["key0"].updates["model.layers.0.self_attn.q_proj"]
    config = lk.LoraConfig(rank=update.rank, targets=["q_proj"])
    lk.Adapter(config, {"model.layers.9.self_attn.q_proj": update}).save(tmp_path / "module")
    lk.Adapter(config, {"model.layers.0.self_attn.k_proj": update}).save(tmp_path / "shape")
    fingerprint = {**adapters["key0"].metadata["fingerprint"], "architecture": "Other"}
    lk.Adapter(config, adapters["key0"].updates, metadata={"fingerprint": fingerprint}).save(tmp_path / "other")
    wanted = alone(base, adapters, IDS, (("key0", 1.0),))

    async def scenario():
        async with running(tmp_path) as (engine, made):
            for name in ("module", "shape", "other"):
                with pytest.raises(AdapterError, match=f"'{name}'"):
                    await ask(engine, made, name)
                with pytest.raises(AdapterError, match=f"'{name}-loaded'"):
                    await made.load(f"{name}-loaded", name)
                assert await ask(engine, made, "good") == wanted
            assert {card.name: card.status for card in made.cards()} == {
                "good": "ready",
                "module": "failed",
                "other": "failed",
                "shape": "failed",
            }

    asyncio.run(scenario())
