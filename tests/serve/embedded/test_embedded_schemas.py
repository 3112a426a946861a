"""Requests of the embedded engine whose answers are held to a schema: what happens while it is compiled."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
from embedded_parts import IDS, answer, greedy_work, read, run_engine

from lorakit.serve.embedded.grammar import Grammars
from lorakit.serve.errors import Cannot


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

    assert run_engine(scenario, grammars=Refusing())[1] == "length"


class SlowGrammars(Grammars):
    """Each schema is refused, once `go` is set."""

    def __init__(self):
        super().__init__(SimpleNamespace(eos_token_id=0))
        self.began: list[str] = []
        self.go = threading.Event()

    def matcher(self, schema):
        self.began.append(schema)
        assert self.go.wait(30)
        raise Cannot(f"no {schema}", "schema")


def test_a_schema_is_not_compiled_for_those_who_have_hung_up():
    grammars = SlowGrammars()

    async def scenario(engine):
        for n in range(8):  # more than may be open at once
            ticket = engine.submit(greedy_work(schema=f"of hung up {n}"))
            ticket.cancel()
            assert (await read(ticket))[1] == "cancelled"
        grammars.go.set()
        with pytest.raises(Cannot, match="no honest"):
            await answer(engine, IDS, (), 3, schema="honest")

    run_engine(scenario, grammars=grammars, rows=1, waiting=2)
    assert len(grammars.began) <= 3  # one that was begun is finished
    assert grammars.began[-1] == "honest"


def test_a_deadline_is_kept_while_a_schema_is_compiled():
    grammars = SlowGrammars()

    async def scenario(engine):
        late = engine.submit(greedy_work(schema="late", deadline=time.monotonic() + 0.1))
        finish = (await read(late))[1]
        grammars.go.set()
        return finish

    assert run_engine(scenario, grammars=grammars) == "timeout"
