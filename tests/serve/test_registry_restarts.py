"""Adapters below roots, and the state file over restarts, above an engine with nothing behind it."""

from __future__ import annotations

import asyncio
import os
import shutil
import time

import pytest
import served_adapters
from served_adapters import Held, names, registry, settled, write

from lorakit.errors import AdapterError, ConfigError, StateError, WriteError
from lorakit.serve.errors import UnknownAdapter

# ------------------------------------------------------------------------------------------ roots


def test_adapters_below_a_root_are_named_by_their_paths(tmp_path, caplog):
    async def scenario():
        root = tmp_path / "root"
        write(root / "team" / "sql")
        write(root / "team" / "with space")
        write(root / "base")  # the base's own name
        served_adapters.value().save(root / "single.safetensors", format="loralib")
        write(root / "run" / "adapter")
        write(root / "run" / "checkpoints" / "step-1")
        (root / "run" / "config.yaml").write_text("x: 1")
        write(root / "unfinished" / "checkpoints" / "step-1")
        (root / "unfinished" / "config.yaml").write_text("x: 1")
        write(root / ".hidden" / "x")
        (root / "model").mkdir()
        (root / "model" / "model-00001-of-00002.safetensors").write_bytes(b"x")
        write(tmp_path / "outside")
        (root / "linked").symlink_to(tmp_path / "outside")
        (root / "notes.txt").write_text("x")
        made = registry(Held(), root)
        await made.start()
        assert sorted(names(made)) == ["run", "single", "team/sql"]
        assert "team/with space" in caplog.text
        assert "'base'" in caplog.text
        async with made.lease("run:0.5+team/sql", None):
            pass

    asyncio.run(scenario())


def test_a_new_folder_is_found_by_a_request_for_its_name(root):
    async def scenario():
        made = registry(Held(), root)
        await made.start()
        write(root / "later", 3)
        async with made.lease("later", None) as leased:
            assert leased.leading.name == "later"
        shutil.rmtree(root / "b")
        assert await made.rescan() == 0
        assert names(made) == ["a", "later"]
        shutil.rmtree(root / "later")
        await made.rescan()
        assert "later" in names(made)  # it is loaded, and goes on

    asyncio.run(scenario())


def test_unknown_names_do_not_make_the_server_look_all_the_time(root, monkeypatch):
    async def scenario():
        made = registry(Held(), root)
        looks = []
        real = type(made.locations).below_roots
        monkeypatch.setattr(type(made.locations), "below_roots", lambda self: (looks.append(1), real(self))[1])
        await made.start()

        async def ask(number):
            with pytest.raises(UnknownAdapter):
                async with made.lease(f"nothing-{number}", None):
                    pass

        begin = time.monotonic()
        await asyncio.gather(*(ask(number) for number in range(200)))
        assert len(looks) <= 3
        assert time.monotonic() - begin < 5

    asyncio.run(scenario())


def test_more_than_may_be_registered_are_left_out_with_a_warning(root, caplog):
    async def scenario():
        made = registry(Held(), root, max_registered=1)
        await made.start()
        assert names(made) == ["a"]
        assert "not registered" in caplog.text
        with pytest.raises(StateError, match="registered already"):
            await made.load("mine", "b")

    asyncio.run(scenario())


def test_a_thousand_registered_names_cost_no_reading(tmp_path):
    async def scenario():
        for number in range(1000):
            folder = tmp_path / "root" / f"customer-{number}"
            folder.mkdir(parents=True)
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                (folder / name).touch()
        engine = Held()
        made = registry(engine, tmp_path / "root")
        begin = time.process_time()
        await made.start()
        assert len(made.cards()) == 1000
        assert engine.calls == []
        assert time.process_time() - begin < 2

    asyncio.run(scenario())


# ------------------------------------------------------------------------------------------ the state file


def test_what_was_loaded_over_http_is_there_after_a_restart(root, tmp_path):
    async def scenario():
        state = tmp_path / "state" / "adapters.json"
        first = registry(Held(), root, state=state)
        await first.start()
        await first.load("one", "a", pin=True)
        await first.load("two", "b")
        await first.load("three", "b")
        await first.unload("two")
        async with first.lease("b", None):
            pass  # a root's own, which is found anyway
        before = {(card.name, card.place, card.created, card.pinned) for card in first.cards()}
        await first.close()
        engine = Held()
        second = registry(engine, root, state=state)
        await second.start()
        assert {(card.name, card.place, card.created, card.pinned) for card in second.cards()} == before
        assert engine.calls == []
        async with second.lease("one", None):
            assert engine.pinned == {second.get("one").key}
        await second.close()

    asyncio.run(scenario())


def test_a_state_file_that_cannot_be_written_fails_the_load(root, tmp_path, monkeypatch):
    async def scenario():
        import lorakit.serve.state_file as module

        engine = Held()
        made = registry(engine, root, state=tmp_path / "state.json")
        await made.start()
        await made.load("one", "a")
        before = (tmp_path / "state.json").read_text()

        def full(path, text):
            raise WriteError(f"cannot write {path}: no space left")

        monkeypatch.setattr(module, "write_text", full)
        for action in (made.load("two", "b"), made.load("one", "b", in_place=True), made.unload("one")):
            with pytest.raises(WriteError):
                await action
        await settled(made)
        assert names(made) == ["a", "b", "one"]
        assert made.get("one").place == "a"
        assert (tmp_path / "state.json").read_text() == before
        assert len(engine.loaded) == 1
        async with made.lease("one", None):
            pass
        await made.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("{", "line 1"),
        ("[]", "object"),
        ('{"version": 2}', "version 2"),
        ('{"version": 1, "base": "other", "adapters": []}', "'other'"),
        ('{"version": 1, "base": "base", "adapters": {}}', "list"),
        ('{"version": 1, "base": "base", "adapters": [{"name": "x"}]}', "adapter 0"),
        (
            '{"version": 1, "base": "base", "adapters": [{"name": "../", "place": "", "pinned": true, "created": 1}]}',
            "'../'",
        ),
        (
            '{"version": 1, "base": "base", "adapters": [{"name": "x", "place": "a", "pinned": 1, "created": 1}]}',
            "pinned",
        ),
    ],
)
def test_a_broken_state_file_is_an_error_with_the_fix(text, said, root, tmp_path):
    async def scenario():
        (tmp_path / "state.json").write_text(text)
        made = registry(Held(), root, state=tmp_path / "state.json")
        with pytest.raises(ConfigError) as error:
            await made.start()
        assert said in str(error.value)
        assert "state.json" in str(error.value)
        assert (tmp_path / "state.json").read_text() == text

    asyncio.run(scenario())


def test_two_servers_do_not_share_a_state_file(root, tmp_path):
    async def scenario():
        first = registry(Held(), root, state=tmp_path / "state.json")
        await first.start()
        second = registry(Held(), root, state=tmp_path / "state.json")
        with pytest.raises(WriteError, match=rf"process {os.getpid()}(.|\n)*--state"):
            await second.start()
        await first.close()
        await second.start()
        await second.close()

    asyncio.run(scenario())


def test_a_restored_place_that_is_not_allowed_any_more_is_said_at_its_use(root, tmp_path):
    async def scenario():
        state = tmp_path / "state.json"
        first = registry(Held(), root, state=state)
        await first.load("one", "a")
        await first.close()
        (tmp_path / "other").mkdir()
        for roots in ((tmp_path / "other",), ()):
            second = registry(Held(), *roots, state=state)
            await second.start()
            assert names(second) == ["one"]
            with pytest.raises((AdapterError, ConfigError), match="--adapters"):
                async with second.lease("one", None):
                    pass
            assert second.get("one").status == "failed"
            await second.close()

    asyncio.run(scenario())


def test_loads_at_the_same_time_are_all_in_the_state_file(root, tmp_path):
    async def scenario():
        state = tmp_path / "state.json"
        first = registry(Held(), root, state=state)
        await first.start()
        await asyncio.gather(*(first.load(f"name-{number}", "ab"[number % 2]) for number in range(12)))
        await asyncio.gather(*(first.unload(f"name-{number}") for number in range(0, 12, 3)))
        expected = names(first)
        await first.close()
        second = registry(Held(), root, state=state)
        await second.start()
        assert names(second) == expected
        assert len(expected) == 2 + 8
        await second.close()

    asyncio.run(scenario())
