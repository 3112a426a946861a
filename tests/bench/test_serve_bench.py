"""The sides of `lorakit bench serve` give the same answers, and its rows count what they say."""

from __future__ import annotations

import asyncio
import itertools
import json
from dataclasses import replace

import pytest

import lorakit as lk
from lorakit.bench import serve, serve_client, serve_cold, serve_http, serve_memory, suite
from lorakit.bench.serve import REQUESTS, Setting, adapters_of, answers, asked, equal_row, same
from lorakit.bench.serve_sides import Static, engine_side, peft_side
from lorakit.bench.train_step import Shape

SMALL = Shape(hidden=64, layers=1, ffn=96, vocabulary=4096)
SETTING = Setting("64 x 1", SMALL, 0.1)


@pytest.fixture(scope="module")
def adapters() -> dict[str, lk.Adapter]:
    return adapters_of(SETTING, 3)


def test_requests_take_turns_and_are_the_same_for_every_number_of_adapters():
    base, three = asked(SETTING, 0), asked(SETTING, 3)
    assert len(base) == len(three) == REQUESTS
    assert [request.ids for request in base] == [request.ids for request in three]
    assert [request.new for request in base] == [request.new for request in three]
    assert all(request.choice == () and request.adapter is None for request in base)
    assert [request.adapter for request in three[:4]] == ["adapter0", "adapter1", "adapter2", "adapter0"]


def test_lengths_are_those_of_the_setting():
    whole, half = asked(Setting("", SMALL, 1.0), 0), asked(Setting("", SMALL, 0.5), 0)
    assert all(12 <= len(request.ids) <= 64 and 12 <= request.new <= 48 for request in whole)
    assert all(len(one.ids) == max(2, round(len(other.ids) / 2)) for one, other in zip(half, whole, strict=True))


def test_adapters_have_unequal_ranks_and_change_the_answers(adapters):
    assert [adapter.config.rank for adapter in adapters.values()] == list(serve.RANKS[:3])
    routed = engine_side(serve.model_of(SETTING), adapters)
    try:
        assert routed.answers(asked(SETTING, 0)) != routed.answers(asked(SETTING, 3))
    finally:
        routed.close()


def test_the_engine_transformers_and_peft_give_the_same_answers(adapters):
    pytest.importorskip("peft")
    requests = asked(SETTING, 3)
    routed = engine_side(serve.model_of(SETTING), adapters)
    try:
        found = {
            "routed": routed.answers(requests),
            "PEFT": peft_side(serve.model_of(SETTING), adapters, 32).answers(requests),
            "base": routed.answers(asked(SETTING, 0)),
            "static": Static(serve.model_of(SETTING), 32).answers(asked(SETTING, 0)),
        }
    finally:
        routed.close()
    assert [len(ids) for ids in found["routed"]] == [request.new for request in requests]
    same(found, "routed", "PEFT")
    same(found, "base", "static")
    with pytest.raises(RuntimeError, match="of 64 answers of routed and base differ"):
        same(found, "routed", "base")


def test_answers_of_every_mix_equal_those_alone(adapters):
    rows = answers(SETTING, adapters, (1, 3))
    assert [row["answers"] for row in rows] == ["base", "3 adapters", "mixes of two", "mixes of two, reloaded"]
    assert all(row["equal to alone"] == "64 of 64" for row in rows)


def test_unequal_answers_are_counted():
    row = equal_row(SETTING, "base", [(1, 2), (3,), (4,)], [(1, 2), (3, 5), (4,)])
    assert row["equal to alone"] == "2 of 3"


def test_the_rank_of_a_size(tmp_path):
    rank, size = serve_cold.rank_of(SMALL, 0.1)
    source = serve_cold.saved(SMALL, tmp_path / "adapter", rank)
    written = sum(path.stat().st_size for path in (tmp_path / "adapter").glob("*.safetensors"))
    assert size == pytest.approx(0.1e6, rel=0.05)
    assert written == pytest.approx(size, rel=0.1)
    assert source.read().config.rank == rank


def test_waits_overlap_a_span_and_include_the_one_that_goes_on():
    times = [1.0, 2.0, 4.0, 5.0]
    assert serve_cold._waits(times, 2.5, 3.0) == [2.0]
    assert serve_cold._waits(times, 4.5, 9.0) == [1.0, 4.0]
    assert serve_cold._waits([], 0.0, 1.0) == []


def test_memory_is_read_around_the_cycles_and_around_all_that_are_known(monkeypatch):
    readings = itertools.count(100 << 20, 1 << 20)
    monkeypatch.setattr(serve_memory, "resident", lambda: next(readings))
    cycles, many = serve_memory.cycles(quick=True), serve_memory.registered(quick=True)
    assert cycles["growth %"] == 1.0
    assert many["added over allowed"] == pytest.approx((1 << 20) / (4 * 1e6 * 2.2 + (1 << 20)), rel=0.1)


def test_a_failed_process_of_the_memory_rows_is_an_error(monkeypatch):
    monkeypatch.setattr(serve_memory.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="measures memory failed"):
        serve_memory.memory(quick=True)


def test_clients_count_the_tokens_of_streams_and_stop_at_an_error():
    httpx2 = pytest.importorskip("httpx2")

    def reply(request):
        body = json.loads(request.content)
        if body["model"] == "unknown":
            return httpx2.Response(404, json={"error": {"message": "no such model"}})
        usage = json.dumps({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
        return httpx2.Response(200, text=f'data: {{"choices": [], "usage": null}}\n\ndata: {usage}\n\ndata: [DONE]\n\n')

    def ask(*bodies):
        transport = httpx2.MockTransport(reply)
        return asyncio.run(serve_client.ask("http://test", list(bodies), 2, transport))

    assert ask(*({"model": "base", "max_tokens": n} for n in (3, 4, 5))) == 12
    with pytest.raises(RuntimeError, match=r"404.*no such model"):
        ask({"model": "unknown", "max_tokens": 1})


def test_through_http_come_as_many_tokens_as_directly():
    pytest.importorskip("fastapi")
    embedded = serve.SETTINGS[0]
    requests = [replace(request, new=3) for request in asked(embedded, 1)[:4]]
    row = serve_http.through_http(adapters_of(embedded, 1), requests, at_once=2, rounds=1)
    assert row["HTTP over direct"] > 0


def test_the_table_has_a_row_for_each_comparison(monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(serve, "REQUESTS", 8)
    monkeypatch.setattr(serve, "SETTINGS", (SETTING,))
    monkeypatch.setattr(serve, "through_http", lambda *given: {"model": "m", "HTTP over direct": 0.9})
    monkeypatch.setattr(serve, "cold", lambda quick: [{"model": "m", "cold beyond warm ms": 5}])
    monkeypatch.setattr(serve, "memory", lambda quick: [{"model": "m", "growth %": 0.1}])
    rows = suite.measure("serve", quick=True)
    assert [row["adapters"] for row in rows if "over PEFT" in row] == [1, 8]
    assert all(row[name] > 0 for row in rows[:2] for name in ("over base", "over static", "over PEFT"))
    assert {"HTTP over direct", "cold beyond warm ms", "growth %", "equal to alone"} <= {
        name for r in rows for name in r
    }
