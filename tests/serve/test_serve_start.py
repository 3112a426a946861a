"""Putting a server together: what fails on the way leaves nothing running."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from served_adapters import Held, write
from served_app import tokenizer

from lorakit.errors import AdapterError, LorakitError
from lorakit.serve import start as module
from lorakit.serve.settings import ServeSettings


class Noted(Held):
    """Notes that it was stopped; `broken`: its start raises."""

    def __init__(self, broken: bool = False):
        super().__init__()
        self.broken, self.stopped = broken, 0

    async def start(self):
        if self.broken:
            raise LorakitError("no memory for the model")
        return await super().start()

    async def stop(self, drain):
        self.stopped += 1
        await super().stop(drain)


def start(monkeypatch, engine, **settings):
    built = module.Built(engine, tokenizer(), ())
    monkeypatch.setattr(module, "import_module", lambda *_: SimpleNamespace(build=lambda _: built))
    return asyncio.run(module.start(ServeSettings("embedded", "base", **settings), lambda service: None))


def test_an_engine_that_fails_while_it_starts_is_stopped(monkeypatch):
    engine = Noted(broken=True)
    with pytest.raises(LorakitError, match="no memory for the model"):
        start(monkeypatch, engine)
    assert engine.stopped == 1


def test_an_adapter_that_cannot_be_served_stops_the_engine(monkeypatch, tmp_path):
    engine = Noted()
    engine.refuse = AdapterError("of another base")
    with pytest.raises(AdapterError, match="'sql' cannot be served: of another base"):
        start(monkeypatch, engine, adapters={"sql": str(write(tmp_path / "sql"))})
    assert engine.stopped == 1


def test_an_adapter_that_is_not_there_is_said_before_the_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "import_module", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "gone", tmp_path / "empty"):
        with pytest.raises(AdapterError, match="sql"):
            asyncio.run(module.start(ServeSettings("embedded", "base", {"sql": str(path)}), lambda service: None))
