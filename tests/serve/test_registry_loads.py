"""Loading and unloading over HTTP and from the command line, above an engine with nothing behind it."""

from __future__ import annotations

import asyncio
import shutil
import time

import pytest
from served_adapters import Held, adapters_alive, names, registry, settled, write

from lorakit.errors import AdapterError, ConfigError, StateError
from lorakit.serve import registered
from lorakit.serve.engine import Sampling, Work
from lorakit.serve.errors import UnknownAdapter
from lorakit.serve.guard.hub import Hub

# ------------------------------------------------------------------------------------------ loading and unloading


def test_loading_over_http_gives_a_name_to_a_place(root):
    async def scenario():
        engine = Held()
        made = registry(engine, root, base=None)
        await made.start()
        card = await made.load("mine", "a", pin=True)
        assert (card.name, card.place, card.status, card.pinned) == ("mine", "a", "ready", True)
        assert engine.pinned == {card.key}
        assert abs(card.created - time.time()) < 60
        with pytest.raises(StateError, match="loaded already"):
            await made.load("mine", "a")
        await made.load("mine", "a", in_place=True)
        await settled(made)
        assert engine.calls.count(("load", "mine")) == 2
        assert engine.pinned == set()
        assert await made.unload("mine") == 1000
        with pytest.raises(UnknownAdapter, match="did you mean"):
            await made.unload("aa")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("name", "place", "error"),
    [
        ("base", "a", ConfigError),
        ("x y", "a", ConfigError),
        ("x", "missing", AdapterError),
        ("x", "../root/a", AdapterError),
        ("x", "/etc", AdapterError),
        ("x", "a/adapter_config.json/x", AdapterError),
        ("x", "hf://someone/thing", ConfigError),
        ("x", "someone/thing", AdapterError),
        ("x", "", AdapterError),
    ],
)
def test_a_load_that_fails_changes_nothing(name, place, error, root, tmp_path):
    async def scenario():
        made = registry(Held(), root, state=tmp_path / "state.json")
        await made.start()
        with pytest.raises(error) as caught:
            await made.load(name, place)
        assert str(tmp_path) not in str(caught.value)
        assert names(made) == ["a", "b"]
        assert not (tmp_path / "state.json").exists()
        await made.close()

    asyncio.run(scenario())


def test_nothing_is_loaded_over_http_without_roots(tmp_path):
    async def scenario():
        made = registry(Held())
        for place in ("x", "/etc", "someone/thing"):
            with pytest.raises(ConfigError, match="--adapters"):
                await made.load("x", place)

    asyncio.run(scenario())


def test_in_place_requests_that_run_keep_what_they_have(root):
    async def scenario():
        engine = Held()
        made = registry(engine, root)
        await made.load("policy", "a")
        old = made.get("policy").key
        async with made.lease("policy", None) as running:
            write(root / "a", 7, data={"template": "plain"})
            async with made.lease("policy", None) as same:
                assert same.choice == running.choice  # a file that changed changes nothing by itself
            card = await made.load("policy", "a", in_place=True)
            assert card.key != old
            assert {old, card.key} == set(engine.loaded)
            async with made.lease("policy", None) as new:
                assert new.choice == ((card.key, 1.0),)
                assert new.leading.chat.style == "plain"
                assert made.get("policy").running == 2
            assert running.choice == ((old, 1.0),)
            assert running.leading.chat.style == "chat"
            engine.submit(Work((1,), running.choice, Sampling(4)))
            assert old in engine.loaded
        await settled(made)
        assert set(engine.loaded) == {card.key}

    asyncio.run(scenario())


def test_an_in_place_load_that_fails_leaves_the_old_content(root):
    async def scenario():
        engine = Held()
        made = registry(engine, root)
        before = await made.load("policy", "a")
        (root / "a" / "adapter_config.json").write_text("{")
        with pytest.raises(AdapterError):
            await made.load("policy", "a", in_place=True)
        write(root / "a", 7)
        engine.refuse = AdapterError("of another base")
        with pytest.raises(AdapterError, match="another base"):
            await made.load("policy", "a", in_place=True)
        engine.refuse = None
        await settled(made)
        assert made.get("policy").key == before.key
        assert set(engine.loaded) == {before.key}

    asyncio.run(scenario())


def test_unload_waits_for_requests_and_refuses_new_ones_at_once(root):
    async def scenario():
        engine = Held()
        made = registry(engine, root)
        await made.load("mine", "a")
        async with made.lease("mine", None):
            unloading = asyncio.create_task(made.unload("mine"))
            await asyncio.sleep(0.01)
            assert not unloading.done()
            assert engine.loaded
            with pytest.raises(UnknownAdapter):
                async with made.lease("mine", None):
                    pass
        assert await unloading == 1000
        assert not engine.loaded

    asyncio.run(scenario())


def test_content_that_another_name_gets_while_it_is_unloaded_stays(root):
    async def scenario():
        engine = Held()
        made = registry(engine, root)
        await made.load("mine", "a")
        async with made.lease("mine", None):
            unloading = asyncio.create_task(made.unload("mine"))
            await asyncio.sleep(0.01)
            await made.load("other", "a")
            assert await unloading == 0
        await settled(made)
        assert len(engine.loaded) == 1
        async with made.lease("other", None):
            pass

    asyncio.run(scenario())


def test_unloading_a_root_s_adapter_lets_its_next_use_read_it_anew(root):
    async def scenario():
        engine = Held()
        made = registry(engine, root)
        await made.start()
        async with made.lease("a", None):
            old = made.get("a").key
        assert await made.unload("a") == 1000
        assert (made.get("a").status, made.get("a").key) == ("registered", None)
        write(root / "a", 9)
        async with made.lease("a", None):
            assert made.get("a").key != old

    asyncio.run(scenario())


def test_names_loaded_unloaded_and_leased_at_once_end_in_order(root):
    """All orders of the three, many at a time: no error but those that are meant, nothing left over."""

    async def scenario():
        engine = Held()
        made = registry(engine, root)

        async def one(number):
            try:
                if number % 3 == 0:
                    await made.load("mine", "ab"[number % 2], in_place=number % 2 == 0)
                elif number % 3 == 1:
                    await made.unload("mine")
                else:
                    async with made.lease("mine", None) as leased:
                        await asyncio.sleep(0.001 * (number % 5))
                        assert all(key in engine.loaded for key, _ in leased.choice)
            except (UnknownAdapter, StateError):
                pass

        for _ in range(5):
            await asyncio.gather(*(one(number) for number in range(24)))
        await settled(made)
        if "mine" in names(made):
            await made.unload("mine")
        await settled(made)
        assert not engine.loaded
        assert len(made.versions) == 0
        assert not made._locks

    asyncio.run(scenario())


def test_pins_of_several_names_add_up(root):
    async def scenario():
        engine = Held()
        made = registry(engine, root)
        key = (await made.load("one", "a", pin=True)).key
        await made.load("two", "a")
        assert engine.pinned == {key}
        await made.load("one", "b", in_place=True)
        await settled(made)
        assert engine.pinned == set()
        assert key in engine.loaded

    asyncio.run(scenario())


def test_no_adapter_is_kept_in_memory_by_the_registry(root):
    async def scenario():
        before = adapters_alive()  # fixtures of other tests have some
        engine = Held()
        made = registry(engine, root)
        await made.start()
        async with made.lease("a+b", None):
            pass
        assert adapters_alive().keys() <= before.keys()

    asyncio.run(scenario())


# ------------------------------------------------------------------------------------------ the command line


def test_adapters_of_the_command_line_are_loaded_at_the_start(tmp_path):
    async def scenario():
        path = write(tmp_path / "elsewhere" / "x")
        engine = Held()
        made = registry(engine)
        card = made.add("sql", path, pin=True)
        assert (card.name, card.place, card.status) == ("sql", "x", "registered")  # nowhere a path of this machine
        await made.start()
        assert made.get("sql").status == "ready"
        assert made.get("sql").created == max(int(file.stat().st_mtime) for file in path.iterdir())
        assert engine.pinned == {made.get("sql").key}
        with pytest.raises(StateError, match="called 'sql'"):
            made.add("sql", path)
        with pytest.raises(ConfigError):
            made.add("base", path)
        with pytest.raises(AdapterError, match="there is no file"):
            made.add("other", tmp_path / "missing")

    asyncio.run(scenario())


def test_a_broken_one_of_the_command_line_stops_the_start(tmp_path):
    async def scenario():
        path = write(tmp_path / "x")
        (path / "adapter_model.safetensors").write_bytes(b"nothing")
        made = registry(Held())
        made.add("sql", path)
        with pytest.raises(AdapterError, match="sql"):
            await made.start()

    asyncio.run(scenario())


def test_a_name_of_the_command_line_is_not_a_client_s_to_change(root, tmp_path):
    async def scenario():
        path = write(tmp_path / "x")
        made = registry(Held(), root)
        made.add("sql", path)
        await made.start()
        with pytest.raises(StateError, match="command line"):
            await made.load("sql", "a", in_place=True)
        before = made.get("sql").key
        write(path, 5)
        card = await made.load("sql", str(path), in_place=True)
        assert (card.key != before, card.place) == (True, "x")
        assert (await made.load("sql", "x", in_place=True)).key == card.key  # as /v1/models names it

    asyncio.run(scenario())


def test_a_path_of_the_command_line_that_is_gone_is_neither_shown_nor_asked_of_the_hub(tmp_path, monkeypatch):
    """Its text may be a hub id too, where the repository is a stranger's."""
    monkeypatch.chdir(tmp_path)

    async def scenario():
        write(tmp_path / "runs" / "sql")
        made = registry(Held())
        made.add("relative", "runs/sql")
        made.add("absolute", tmp_path / "runs" / "sql")
        await made.start()
        shutil.rmtree(tmp_path / "runs")
        monkeypatch.setattr(Hub, "fetch", lambda *_, **__: pytest.fail("a path of this machine was asked of the hub"))
        for name in ("relative", "absolute"):
            await made.unload(name)
            with pytest.raises(AdapterError, match=f"the files of adapter '{name}' are gone") as caught:
                async with made.lease(name):
                    pass
            assert str(tmp_path) not in str(caught.value)
            assert str(tmp_path) not in str(made.get(name))
        write(tmp_path / "runs" / "sql")
        await asyncio.sleep(0)
        monkeypatch.setattr(registered, "RETRY_SECONDS", 0)
        async with made.lease("relative"):
            pass
        await settled(made)

    asyncio.run(scenario())


def test_a_load_in_place_can_leave_the_pin_as_it_is(root):
    async def scenario():
        engine = Held()
        made = registry(engine, root)
        await made.load("mine", "a", pin=True)
        card = await made.load("mine", "b", pin=None, in_place=True)
        await settled(made)
        assert card.pinned
        assert card.key in engine.pinned
        assert not (await made.load("new", "a", pin=None)).pinned

    asyncio.run(scenario())


def test_what_the_renderer_cannot_serve_is_not_loaded(root):
    """`check` decides by what the adapter recorded of its prompts, before the engine gets it."""

    async def check(metadata) -> None:
        if metadata["data"]["template"] == "chat":
            raise AdapterError("its chat template cannot be used")

    async def scenario():
        engine = Held()
        made = registry(engine, root, base=None, check=check)
        await made.start()
        with pytest.raises(AdapterError, match="cannot be used"):
            await made.load("mine", "a")
        with pytest.raises(AdapterError, match="cannot be used"):
            async with made.lease("a", None):
                pass
        assert engine.calls == []
        assert next(card for card in made.cards() if card.name == "a").problem == "its chat template cannot be used"
        assert (await made.load("other", "b")).status == "ready"
        await settled(made)

    asyncio.run(scenario())
