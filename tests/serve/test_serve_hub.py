"""Only allowed repositories of the hub are fetched, by the server's own address, after their size was asked for."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import hub_stub
import pytest
import served_adapters
from served_adapters import Held, registry

from lorakit.errors import AdapterError, ConfigError
from lorakit.serve.errors import UnknownAdapter, Unreachable
from lorakit.serve.guard.hub import Hub


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def stub(monkeypatch, tmp_path) -> Iterator[hub_stub.Hub]:
    with hub_stub.serve(monkeypatch, tmp_path) as hub:
        made = served_adapters.write(tmp_path / "adapter", data={"template": "plain"})
        hub.add("someone/sql", {**files(made), "model.safetensors": b"a model", "README.md": b"x"})
        yield hub


@pytest.mark.parametrize(
    ("allowed", "place", "allows"),
    [
        (["someone"], "someone/sql", True),
        (["someone"], "Someone/sql@v1", True),
        (["someone"], "hf://someone/sql", True),
        (["someone/sql"], "someone/sql", True),
        (["someone/sql"], "someone/other", False),
        (["someone"], "someone-else/sql", False),
        (["some"], "someone/sql", False),
        (["someone"], "else/someone", False),
        ([], "someone/sql", False),
        (["someone"], "someone/../other/sql", False),
        (["someone"], "someone/sql/inside", False),
        (["someone"], "http://evil/someone/sql", False),
        (["someone"], "someone/sql@../x", False),
        (["someone"], "someone/sql\n", False),
        (["someone"], "someone%2fsql/x", False),
        (["someone"], "someone/sql?x=1", False),
        (["someone"], "hf://evil@someone/sql", False),
        (["someone"], "someone/..", False),
    ],
)
def test_the_whitelist_is_by_owner_or_repository(allowed, place, allows, monkeypatch):
    asked = []
    monkeypatch.setattr(Hub, "_fetch", lambda self, name, pickles: asked.append(name))
    with contextlib.nullcontext() if allows else pytest.raises(ConfigError):
        Hub(allowed).fetch(place)
    assert len(asked) == allows


@pytest.mark.parametrize("allowed", ["", "*", "a/b/c", "a b", "../x", "a/", "http://x/y", "a..b"])
def test_what_is_no_owner_or_repository_is_no_whitelist(allowed):
    with pytest.raises(ConfigError, match="OWNER"):
        Hub([allowed])


def test_an_allowed_adapter_is_fetched_and_nothing_else_of_its_repository(stub):
    async def scenario():
        engine = Held()
        made = registry(engine, hub=Hub(["someone"]))
        card = await made.load("sql", "someone/sql")
        assert card.place == "someone/sql"
        assert card.chat.style == "plain"
        assert card.key in engine.loaded
        assert stub.fetched() == ["adapter_config.json", "adapter_model.safetensors", "lorakit.json"]
        stub.log.clear()
        assert engine.loaded[card.key].read().updates  # dropped from memory: read from the cache
        assert stub.log == []

    asyncio.run(scenario())


def test_a_repository_that_changed_is_fetched_by_the_next_load_in_place(stub, tmp_path):
    async def scenario():
        made = registry(Held(), hub=Hub(["someone"]))
        before = await made.load("sql", "someone/sql@main")
        stub.add("someone/sql", files(served_adapters.write(tmp_path / "new", 5)))
        async with made.lease("sql", None) as leased:
            assert leased.choice == ((before.key, 1.0),)
        assert (await made.load("sql", "someone/sql@main", in_place=True)).key != before.key

    asyncio.run(scenario())


def test_what_is_not_allowed_is_not_even_asked_for(stub, tmp_path):
    async def scenario():
        (tmp_path / "root").mkdir()
        made = registry(Held(), tmp_path / "root", hub=Hub(["else/sql"]))
        with pytest.raises(ConfigError, match="--hub someone"):
            await made.load("sql", "someone/sql")
        with pytest.raises(AdapterError):
            await made.load("sql", "http://127.0.0.1/someone/sql")
        with pytest.raises(UnknownAdapter):  # a name in a request is no way to load anything
            async with made.lease("someone/sql", None):
                pass
        assert stub.log == []

    asyncio.run(scenario())


def test_a_folder_below_a_root_comes_before_the_hub(stub, tmp_path):
    async def scenario():
        served_adapters.write(tmp_path / "root" / "someone" / "sql", 8)
        made = registry(Held(), tmp_path / "root", hub=Hub(["someone"]))
        await made.load("here", "someone/sql")
        assert stub.log == []
        await made.load("there", "hf://someone/sql")
        assert stub.log
        assert made.get("here").key != made.get("there").key

    asyncio.run(scenario())


def test_a_repository_that_moved_is_judged_by_its_new_name(stub, monkeypatch):
    real = hub_stub._Handler.say

    def moved(self, status, body=None, headers=None, content=None):
        if isinstance(body, dict) and body.get("id") == "someone/sql":
            body = {**body, "id": "evil/sql"}
        real(self, status, body, headers, content)

    monkeypatch.setattr(hub_stub._Handler, "say", moved)
    with pytest.raises(ConfigError, match="moved to 'evil/sql'"):
        Hub(["someone"]).fetch("someone/sql")
    assert stub.fetched() == []


def test_pickles_of_the_hub_are_not_fetched(stub):
    stub.add("someone/old", {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"})
    with pytest.raises(AdapterError, match="pickle"):
        Hub(["someone"]).fetch("someone/old")
    assert stub.fetched() == []


def test_sizes_are_asked_for_first(stub, monkeypatch):
    with pytest.raises(AdapterError, match="at most 100"):
        Hub(["someone"], most_bytes=100).fetch("someone/sql")
    monkeypatch.setattr("lorakit.serve.guard.hub.FREE", 1 << 60)
    with pytest.raises(AdapterError, match="free some space"):
        Hub(["someone"]).fetch("someone/sql")
    assert stub.fetched() == []


def test_errors_of_the_hub_say_what_to_do(stub, tmp_path):
    stub.add("someone/gated", {"adapter_config.json": b"{}"}, gated=True, granted=False)
    stub.add("someone/empty", {"README.md": b"x"})
    cases = {
        "someone/missing": "no repository",
        "someone/sql@nowhere": "no revision 'nowhere'",
        "someone/gated": "gated",
        "someone/empty": "no adapter",
    }
    for place, said in cases.items():
        with pytest.raises(AdapterError) as error:
            Hub(["someone"]).fetch(place)
        assert said in str(error.value)
        assert str(tmp_path) not in str(error.value)
        assert hub_stub.TOKEN not in str(error.value)


def test_the_cache_does_when_the_hub_cannot_be_reached(stub, monkeypatch):
    from huggingface_hub import constants

    hub = Hub(["someone"])
    first = hub.fetch("someone/sql")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.fetch("someone/sql") == first
    with pytest.raises(AdapterError, match="cannot be reached"):
        hub.fetch("someone/other")


def test_a_hub_that_is_out_of_reach_is_an_error_that_heals(stub, monkeypatch):
    """Unlike what the caller, or whoever runs the server, has to change."""
    stub.fail["/api/models/"] = 503
    with pytest.raises(Unreachable, match="try again later") as caught:
        Hub(["someone"]).fetch("someone/sql")
    assert caught.value.retry_after > 0
    stub.fail.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AdapterError, match="HF_HUB_OFFLINE is set") as refused:
        Hub(["someone"]).fetch("someone/never")
    assert not isinstance(refused.value, Unreachable)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match="cannot be reached"):
        Hub(["someone"]).fetch("someone/never")


def test_the_token_is_sent_to_the_hub_alone(stub, monkeypatch):
    """Not to where the hub keeps its large files, and no request can name another hub."""
    got: list[tuple[str, str | None]] = []
    real = hub_stub._Handler.resolve

    class Storage(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            got.append((self.path, self.headers.get("Authorization")))
            content = stub.files("someone/sql")["adapter_model.safetensors"]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Storage) as storage:
        threading.Thread(target=storage.serve_forever, args=(0.02,), daemon=True).start()

        def resolve(self, path, token):
            if not path.endswith(".safetensors"):
                return real(self, path, token)
            assert token == hub_stub.TOKEN
            content = stub.files("someone/sql")["adapter_model.safetensors"]
            headers = {
                "Location": f"http://127.0.0.1:{storage.server_address[1]}/large",
                "X-Linked-Size": str(len(content)),
                "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Repo-Commit": stub.repositories["someone/sql"].refs["main"],
            }
            return self.say(302, headers=headers, content=b"")

        monkeypatch.setattr(hub_stub._Handler, "resolve", resolve)
        fetched = Hub(["someone"]).fetch("someone/sql")
        storage.shutdown()
    assert (fetched.path / "adapter_model.safetensors").stat().st_size > 0
    assert got == [("/large", None)]


def test_a_hub_that_does_not_answer_does_not_stop_other_loads(stub, monkeypatch, tmp_path):
    """A hub id waits for the network in a thread of its own; the threads that read files are not taken."""

    async def scenario():
        served_adapters.write(tmp_path / "root" / "a", 1)
        made = registry(Held(), tmp_path / "root", hub=Hub(["someone"]))
        silent = socket.create_server(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("lorakit.formats.hub.SECONDS", 2.0)
        slow = [asyncio.create_task(made.load(f"slow-{number}", "someone/sql")) for number in range(3)]
        await asyncio.sleep(0.05)
        await asyncio.wait_for(made.load("quick", "a"), 1.5)
        assert not any(task.done() for task in slow)
        silent.close()
        results = await asyncio.gather(*slow, return_exceptions=True)
        assert all(isinstance(result, AdapterError) for result in results)

    asyncio.run(scenario())


def test_the_command_line_may_name_any_repository(stub):
    async def scenario():
        engine = Held()
        made = registry(engine)
        made.add("sql", "someone/sql")
        await made.start()
        assert made.get("sql").status == "ready"

    asyncio.run(scenario())
