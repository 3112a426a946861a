"""Leases of the registry: first use, mixes, failures; above an engine with nothing behind it."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time

import pytest
from served_adapters import Held, adapters_alive, registry, settled

from lorakit.errors import AdapterError, ConfigError, TargetError
from lorakit.serve.engine import Sampling, Work
from lorakit.serve.errors import Busy, Cannot, NoPlace, UnknownAdapter
from lorakit.serve.locations import Locations

# ------------------------------------------------------------------------------------------ first use and leases


def test_the_first_use_of_a_name_reads_hashes_and_loads_it(root):
    async def scenario():
        engine = Held()
        made = registry(engine, root)
        await made.start()
        assert [(card.name, card.status, card.key) for card in made.cards()] == [
            ("a", "registered", None),
            ("b", "registered", None),
        ]
        assert engine.calls == []
        async with made.lease("a", None) as leased:
            ((key, weight),) = leased.choice
            assert key in engine.loaded
            assert weight == 1.0
            assert leased.model == "a"
            assert leased.leading is not None
            assert leased.leading.chat.style == "chat"
            assert leased.leading.chat.end_tokens == ("<a>",)
            assert (leased.leading.rank, leased.leading.status) == (2, "ready")
            assert leased.leading.version == f"a@{key[:6]}"
            assert made.get("a").running == 1
            engine.submit(Work((1,), leased.choice, Sampling(4)))
        assert made.get("a").running == 0
        async with made.lease("a", None) as again:
            assert again.choice == leased.choice
        assert engine.calls == [("load", "a")]
        await made.close()

    asyncio.run(scenario())


def test_the_base_needs_nothing(root):
    async def scenario():
        engine = Held()
        made = registry(engine, root)
        await made.start()
        for name in ("base", "org/base"):
            async with made.lease(name, None) as leased:
                assert (leased.model, leased.choice, leased.cards, leased.leading) == (name, (), (), None)
        with pytest.raises(ConfigError, match="scale"):
            async with made.lease("base", 0.5):
                pass
        assert engine.calls == []

    asyncio.run(scenario())


def test_errors_of_the_engine_name_adapters_as_the_caller_does(root):
    async def scenario():
        made = registry(Held(), root)
        await made.start()

        async def mixed():
            async with made.lease("a:0.3+b:0.7", None) as leased:
                (first, _), (second, _) = leased.choice
                raise Cannot(f"adapter '{first}' and '{second}' cannot be mixed", "mix")

        with pytest.raises(Cannot) as error:
            await mixed()
        assert str(error.value) in ("adapter 'a' and 'b' cannot be mixed", "adapter 'b' and 'a' cannot be mixed")
        assert error.value.what == "mix"
        await made.close()

    asyncio.run(scenario())


def test_mixes_have_one_choice_however_they_are_written(root):
    async def scenario():
        made = registry(Held(), root)
        await made.start()
        async with made.lease("a:0.3+b:0.7", 0.5) as first, made.lease("base:b:0.7+a:0.3", 0.5) as second:
            assert first.choice == second.choice
            assert {round(weight, 6) for _, weight in first.choice} == {0.15, 0.35}
            assert [card.name for card in first.cards] == ["b", "a"]
            assert first.leading.chat.style == "plain"
        async with made.lease("a", 0) as none:
            assert none.choice == ()
            assert none.leading.name == "a"

    asyncio.run(scenario())


def test_names_with_one_content_share_it_and_weights_add_up(root):
    async def scenario():
        shutil.copytree(root / "a", root / "twin")
        engine = Held()
        made = registry(engine, root)
        await made.start()
        async with made.lease("a:0.5+twin:0.25", None) as leased:
            assert [weight for _, weight in leased.choice] == [0.75]
        assert len(engine.loaded) == 1
        assert engine.calls == [("load", "a")]
        assert await made.unload("a") == 0
        await settled(made)
        assert len(engine.loaded) == 1
        assert await made.unload("twin") == 1000
        assert not engine.loaded

    asyncio.run(scenario())


def test_concurrent_first_uses_load_once_and_outlive_who_asked_first(root):
    async def scenario():
        engine = Held()
        engine.gate = asyncio.Event()
        made = registry(engine, root)
        await made.start()

        async def use():
            async with made.lease("a", None) as leased:
                return leased.choice

        tasks = [asyncio.create_task(use()) for _ in range(10)]
        while not engine.calls:
            await asyncio.sleep(0.001)
        tasks[0].cancel()
        await asyncio.sleep(0)
        engine.gate.set()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(done[0], asyncio.CancelledError)
        assert len(set(done[1:])) == 1
        assert engine.calls == [("load", "a")]
        assert made.get("a").running == 0

    asyncio.run(scenario())


def test_what_the_engine_has_not_got_is_refused_before_anything_is_loaded(root):
    async def scenario():
        engine = Held()
        made = registry(engine, root, can=frozenset({"schema"}))
        await made.start()
        for model, scale, what in [("a+b", None, "mix"), ("a:0.5", None, "scale"), ("a", 0.5, "scale")]:
            with pytest.raises(Cannot) as error:
                async with made.lease(model, scale):
                    pass
            assert error.value.what == what
        assert engine.calls == []
        async with made.lease("a", 1.0):
            pass

    asyncio.run(scenario())


def test_an_error_in_a_request_lets_go_of_its_adapters(root):
    async def scenario():
        made = registry(Held(), root)
        await made.start()
        with pytest.raises(ZeroDivisionError):
            async with made.lease("a+b", None):
                raise ZeroDivisionError
        with pytest.raises(UnknownAdapter):
            async with made.lease("a+c", None):
                pass
        assert [card.running for card in made.cards()] == [0, 0]

    asyncio.run(scenario())


# ------------------------------------------------------------------------------------------ failures


def test_a_broken_adapter_says_why_and_is_tried_again_after_its_files_changed(root):
    async def scenario():
        engine = Held()
        made = registry(engine, root)
        await made.start()
        good = (root / "a" / "adapter_model.safetensors").read_bytes()
        (root / "a" / "adapter_model.safetensors").write_bytes(good[:50])
        for _ in range(3):
            with pytest.raises(AdapterError) as error:
                async with made.lease("a", None):
                    pass
            assert str(root) not in str(error.value)
            assert "a" in str(error.value)
        card = made.get("a")
        assert card.status == "failed"
        assert card.problem == str(error.value)
        async with made.lease("b", None):
            pass  # others are served
        (root / "a" / "adapter_model.safetensors").write_bytes(good)
        async with made.lease("a", None):
            assert made.get("a").status == "ready"
            assert made.get("a").problem is None

    asyncio.run(scenario())


def test_what_failed_is_not_read_again_for_each_request(root, monkeypatch):
    async def scenario():
        import lorakit.serve.readers as module

        reads = []
        real = module.read_adapter
        monkeypatch.setattr(module, "read_adapter", lambda *given: (reads.append(given), real(*given))[1])
        (root / "a" / "adapter_config.json").write_text("{")
        made = registry(Held(), root)
        await made.start()
        for _ in range(5):
            with pytest.raises(AdapterError):
                async with made.lease("a", None):
                    pass
        assert len(reads) == 1

    asyncio.run(scenario())


def test_what_the_engine_refuses_is_not_left_half_loaded(root):
    async def scenario():
        engine = Held()
        engine.refuse = TargetError("no such module here")
        made = registry(engine, root)
        await made.start()
        with pytest.raises(AdapterError, match="adapter 'a' cannot be served: no such module here"):
            async with made.lease("a", None):
                pass
        await settled(made)
        assert made.get("a").status == "failed"
        assert len(made.versions) == 0
        assert not engine.loaded
        engine.refuse = Busy("later")
        with pytest.raises(Busy):
            async with made.lease("b", None):
                pass
        engine.refuse = None
        async with made.lease("b", None):
            pass  # what may heal is tried again at once

    asyncio.run(scenario())


def test_an_error_that_is_kept_does_not_keep_what_failed(root):
    async def scenario():
        before = adapters_alive()  # fixtures of other tests have some
        engine = Held()
        engine.refuse = AdapterError("of another base")
        made = registry(engine, root)
        await made.start()
        for _ in range(2):
            with pytest.raises(AdapterError, match="another base"):
                async with made.lease("a", None):
                    pass
        engine.refuse = None
        await settled(made)
        assert adapters_alive().keys() <= before.keys()

    asyncio.run(scenario())


def test_a_pin_without_a_place_is_tried_again_at_the_next_use(root):
    """What heals when another adapter is unloaded is not remembered, though the files are the same."""

    async def scenario():
        engine = Held()
        made = registry(engine, root)
        await made.start()
        engine.refuse = NoPlace("adapter 'a' cannot be pinned: all 1 places of the device are, by 'b'")
        with pytest.raises(NoPlace):
            async with made.lease("a"):
                pass
        assert made.get("a").status == "registered"
        engine.refuse = None
        async with made.lease("a"):
            assert made.get("a").status == "ready"

    asyncio.run(scenario())


def test_searches_that_hang_stop_neither_others_nor_the_end_of_the_loop(root):
    """More of them than asyncio has threads, and a loop that closes while they hang."""
    hang = threading.Event()

    async def scenario():
        made = registry(Held(), root)
        await made.start()
        real = Locations.over_http

        def over_http(self, place, label):
            if place == "b":
                hang.wait(60)
            return real(self, place, label)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Locations, "over_http", over_http)
            hung = [asyncio.create_task(made.load(f"hung-{n}", "b")) for n in range((os.cpu_count() or 1) + 6)]
            await asyncio.sleep(0.05)
            assert await asyncio.wait_for(asyncio.to_thread(lambda: 1), 5) == 1
            async with asyncio.timeout(5), made.lease("a"):
                pass
        assert not any(task.done() for task in hung)

    began = time.monotonic()
    try:
        asyncio.run(scenario())
        assert time.monotonic() - began < 20
    finally:
        hang.set()
