"""vLLM's stream to pieces, and requests to bodies: whole, in parts, and as nobody should send it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from lorakit.serve.engine import Piece, Sampling, TokenLogprob, Work
from lorakit.serve.errors import Busy, Cannot, EngineFailed, UnknownAdapter
from lorakit.serve.vllm.answer import ErrorEvent, events, pieces
from lorakit.serve.vllm.http import refusal
from lorakit.serve.vllm.request import body

DONE = b"data: [DONE]\n\n"


def sse(*contents: dict[str, Any]) -> bytes:
    return b"".join(f"data: {json.dumps(c, ensure_ascii=False)}\n\n".encode() for c in contents)


def choice(ids: list[int] | None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": "x", "token_ids": ids, "finish_reason": finish, **more}]}


def read(data: bytes, size: int = 1 << 20, stops: set[int] | None = None, logprobs: int | None = None) -> list[Piece]:
    """Read a stream that arrives in parts of `size` bytes."""

    async def parts() -> AsyncIterator[bytes]:
        for start in range(0, len(data), size):
            yield data[start : start + size]

    async def all_pieces() -> list[Piece]:
        return [piece async for piece in pieces(events(parts()), stops or set(), logprobs)]

    return asyncio.run(all_pieces())


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_pieces_whatever_the_parts(size):
    usage = {"choices": [], "usage": {"prompt_tokens": 40, "prompt_tokens_details": {"cached_tokens": 16}}}
    data = sse(choice([5, 6]), choice([7]), choice([8], "length"), usage) + DONE
    assert read(data, size) == [Piece((5, 6)), Piece((7,)), Piece((8,)), Piece((), finish="length", cached=16)]


def test_line_separators_within_a_text_end_no_event():
    text = "a\u2028b\x85c\x0bd\r"
    data = b": a comment\nevent: message\n" + sse(choice([5], text=text), choice([6], "length", text=text)) + DONE
    assert [piece.ids for piece in read(data, 3)] == [(5,), (6,), ()]


def test_carriage_returns_before_line_feeds():
    data = (sse(choice([5], "length")) + DONE).replace(b"\n", b"\r\n")
    assert read(data)[0].ids == (5,)


@pytest.mark.parametrize(
    ("last", "kept"),
    [
        (choice([7, 2], "stop", stop_reason=2), (7,)),
        (choice([7, 9], "stop", stop_reason=9), (7,)),  # an end that we did not ask for
        (choice([7, 2], "stop", stop_reason=None), (7,)),  # the tokenizer's
        (choice([7, 8], "stop", stop_reason=None), (7, 8)),  # a grammar that ended
        (choice([7, 2], "length"), (7, 2)),
    ],
)
def test_a_stop_token_is_not_part_of_the_answer(last, kept):
    found = read(sse(last) + DONE, stops={2})
    assert found[0].ids == kept
    assert found[-1].finish == last["choices"][0]["finish_reason"]


def test_logprobs_are_sorted_and_cut():
    top = [{"token_id:5": -3.0, "token_id:9": -0.5, "token_id:4": -1.0}]
    data = sse(choice([5], "length", logprobs={"token_logprobs": [-3.0], "top_logprobs": top})) + DONE
    assert read(data, logprobs=2)[0].logprobs == (TokenLogprob(5, -3.0, ((9, -0.5), (4, -1.0))),)
    assert read(data, logprobs=0)[0].logprobs == (TokenLogprob(5, -3.0),)
    assert read(data)[0].logprobs == ()


def test_logprobs_of_a_stop_token_go_with_it():
    given = {"token_logprobs": [-1.0, -2.0], "top_logprobs": [{"token_id:5": -1.0}, {"token_id:2": -2.0}]}
    found = read(sse(choice([5, 2], "stop", stop_reason=2, logprobs=given)) + DONE, stops={2}, logprobs=1)
    assert found[0] == Piece((5,), (TokenLogprob(5, -1.0, ((5, -1.0),)),))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (sse(choice([5])), "broke off"),
        (sse(choice([5])) + DONE, "without a finish_reason"),
        (sse(choice([5])) + b'data: {"id": "cmpl-1", "choi', "broke off"),
        (b"data: {not json}\n\n", "not JSON"),
        (b"data: [1]\n\n", "not an object"),
        (sse(choice([5], "abort")) + DONE, "abort"),
        (sse(choice(None, "length")) + DONE, r"0\.10\.2"),
        (sse({"something": "else"}), "not understood"),
        (sse(choice(["five"], "length")), "not understood"),
    ],
)
def test_what_is_not_an_answer_is_an_error(data, message):
    with pytest.raises(EngineFailed, match=message):
        read(data)


@pytest.mark.parametrize(
    "event", [{"error": {"message": "EngineCore died", "code": 500}}, {"error": "flat", "message": "EngineCore died"}]
)
def test_errors_within_the_stream(event):
    with pytest.raises(ErrorEvent, match="EngineCore died") as failed:
        read(sse(choice([5]), event) + DONE)
    assert failed.value.event == event


@pytest.mark.parametrize("given", [None, {"token_logprobs": [], "top_logprobs": []}, {"token_logprobs": [-1.0]}])
def test_missing_logprobs_are_an_error(given):
    with pytest.raises(EngineFailed, match="not understood"):
        read(sse(choice([5], "length", logprobs=given)) + DONE, logprobs=1)


def test_every_setting_is_sent():
    sampling = Sampling(
        6, 0.8, 0.9, 20, 0.05, 3, frozenset({9, 2}), 4, ((5, 1.5),), presence=0.5, frequency=-0.5, repetition=1.1
    )
    assert body(Work((1, 2), (), sampling), "name", {0}) == {
        "model": "name",
        "prompt": [1, 2],
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "max_tokens": 6,
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.05,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.1,
        "stop_token_ids": [2, 9],
        "ignore_eos": True,
        "seed": 3,
        "logprobs": 4,
        "return_tokens_as_token_ids": True,
        "logit_bias": {"5": 1.5},
    }


def test_a_schema_heeds_the_models_ends():
    made = body(Work((1,), (), Sampling(6, schema='{"type": "integer"}', stop_ids=frozenset({9}))), "base", {0})
    assert made["structured_outputs"] == {"json": {"type": "integer"}}
    assert (made["ignore_eos"], made["stop_token_ids"]) == (False, [0, 9])
    assert not {"seed", "logprobs", "logit_bias"} & made.keys()


@pytest.mark.parametrize(
    ("status", "content", "kind"),
    [
        (400, b'{"error": {"message": "no", "param": "temperature"}}', Cannot),
        (422, b"not json", Cannot),
        (404, b'{"error": {"message": "The model `x` does not exist."}}', UnknownAdapter),
        (429, b"", Busy),
        (503, b"{}", Busy),
        (500, b"[]", EngineFailed),
        (401, b'{"error": "Unauthorized"}', EngineFailed),
    ],
)
def test_statuses_become_the_engines_errors(status, content, kind):
    error = refusal(status, content, Work((1,), (), Sampling(1)))
    assert type(error) is kind
    if isinstance(error, EngineFailed):
        assert error.heals is (status == 500)


def test_a_refusal_names_the_parameter_and_the_time():
    work = Work((1,), (), Sampling(1, schema="{}"))
    named = refusal(400, b'{"error": {"message": "no", "param": "structured_outputs"}}', work)
    unnamed = refusal(400, b'{"object": "error", "message": "grammar", "param": null}', work)
    assert isinstance(named, Cannot)
    assert isinstance(unnamed, Cannot)
    assert (named.what, unnamed.what) == ("schema", "schema")
    assert "grammar" in str(unnamed)
    busy = refusal(429, b"{}", work, {"retry-after": "7"})
    assert isinstance(busy, Busy)
    assert busy.retry_after == 7
