"""Bad requests: OpenAI's error object, the field's name, and a status that its client does not retry."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx2
import openai
import pytest
from served_app import ASK, HELLO, served

from lorakit.serve.engine import Piece, Work
from lorakit.serve.guard.limits import Limits
from lorakit.serve.ticket import Ticket

CHAT = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def app() -> Any:
    return served(limits=Limits(answer_tokens=300, prompt_tokens=400), context=512)


@pytest.mark.parametrize(
    "fields, param, message",
    [
        ({"temperature": "hot"}, "temperature", "expected a number, not 'hot'"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": True}, "temperature", "expected a number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"min_p": 1.5}, "min_p", "less than or equal to 1"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 1000}, "n", "up to 8"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "many"}, "max_tokens", "whole number"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "give one of them"),
        ({"seed": 2**64}, "seed", ""),
        ({"presence_penalty": -3}, "presence_penalty", ""),
        ({"repetition_penalty": 0}, "repetition_penalty", ""),
        ({"stop": 3}, "stop", "expected text or a list, not 3"),
        ({"stop": [3]}, "stop.0", "expected text"),
        ({"stop": ["a"] * 17}, "stop", "up to 16"),
        ({"stop": "a" * 257}, "stop", "up to 256"),
        ({"stop": [""]}, "stop", "empty"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token id"),
        ({"logit_bias": {"258": 1}}, "logit_bias", "0 to 257"),
        ({"logit_bias": {"²": 1}}, "logit_bias", "token id"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "100"),
        ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias", "up to 1024"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"messages": []}, "messages", "expected at least 1 item, not 0"),
        ({"lorakit": {"scal": 1}}, "lorakit.scal", "did you mean 'scale'?"),
        ({"lorakit": {"x": 1}}, "lorakit.x", "expected scale"),
        ({"model": "sql:nan"}, "model", "expected a number from -100 to 100"),
        ({"model": "sql:0.5+"}, "model", "a name left out"),
        ({"model": "sql", "lorakit": {"scale": 1000}}, "lorakit.scale", "from -100 to 100"),
        ({"messages": "Hi"}, "messages", "expected a list, not 'Hi'"),
        ({"messages": ["Hi"]}, "messages.0", ""),
        ({"messages": HELLO * 1001}, "messages", "up to 1000"),
        ({"tools": [{}] * 129}, "tools", "up to 128"),
        ({"tool_choice": "requird"}, "tool_choice", "did you mean 'required'?"),
        ({"stream": "yes"}, "stream", "expected true or false"),
        ({"stream_options": 1}, "stream_options", "names with values"),
        ({"lorakit": {"scale": "x"}}, "lorakit.scale", "a number"),
        ({"lorakit": {"scales": 1}}, "lorakit.scales", "not known"),
        ({"guided_json": {"type": "object"}}, "guided_json", "response_format"),
        ({"guided_json": {}}, "guided_json", "response_format"),
        ({"bad_words": ["a"]}, "bad_words", "logit_bias"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "shorten the prompt"),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output", "append"),
        ({"modalities": ["text", "audio"]}, "modalities", "answers are text"),
        ({"stop_token_ids": [5] * 129}, "stop_token_ids", "up to 128"),
        ({"stop_token_ids": [5, 258]}, "stop_token_ids", "258 is not a token of the model; its ids end at 257"),
        ({"model": "sql:60", "lorakit": {"scale": 60}}, "lorakit.scale", "from -100 to 100"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format", "cannot call tools"),
        ({"functions": [{}]}, "functions", "tools"),
        ({"model": 5}, "model", "expected text"),
    ],
)
def test_the_wrong_field_is_named_with_what_was_expected(app: Any, fields: Any, param: str, message: str):
    before = len(app.engine.works)
    answer = app.post(CHAT, {**ASK, **fields})
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert len(app.engine.works) == before


WRONG = {
    "objects": ("/v1/completions", {"model": "base", "prompt": [{}] * 300_000}),
    "nulls": ("/v1/completions", {"model": "base", "prompt": [None] * 190_000}),
    "lists": ("/v1/completions", {"model": "base", "prompt": [[None]] * 140_000}),
    "stops": ("/v1/completions", {"model": "base", "prompt": "x", "stop": [1] * 490_000}),
    "stop ids": ("/v1/completions", {"model": "base", "prompt": "x", "stop_token_ids": ["a"] * 200_000}),
    "biases": ("/v1/completions", {"model": "base", "prompt": "x", "logit_bias": {str(n): "a" for n in range(80_000)}}),
    "messages": (CHAT, {"model": "base", "messages": [1] * 490_000}),
    "tools": (CHAT, {**ASK, "tools": [1] * 490_000}),
    "tokens": ("/detokenize", {"tokens": ["a"] * 200_000}),
    "a schema": (
        CHAT,
        {
            **ASK,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": {"anyOf": [{}] * 300_000}},
            },
        },
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_large_wrong_body_does_not_stop_the_event_loop(app: Any, kind: str):
    """All of its errors together took up to 7 seconds, in which nobody got an answer."""
    path, body = WRONG[kind]
    encoded = json.dumps(body, separators=(",", ":")).encode()
    assert 600_000 < len(encoded) < 1_000_000
    began = time.thread_time()
    answer = app.post(path, encoded)
    assert time.thread_time() - began < 0.5
    assert answer.status_code == 400
    assert len(answer.text) < 500


def test_a_stopping_server_is_503(app: Any):
    stopping = served()
    asyncio.run(stopping.engine.stop(0))
    answer = stopping.post(CHAT, ASK)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "stopping")
    assert answer.headers["retry-after"]


def test_what_is_out_of_reach_is_asked_for_again():
    from lorakit.serve.errors import Unreachable

    app = served()

    def unreachable(*_: Any, **__: Any) -> Any:
        raise Unreachable("the hub cannot be reached", retry_after=3.0)

    app.registry.lease = app.registry.load = unreachable  # type: ignore[method-assign,assignment]
    load = "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "sql"}
    for path, body in ((CHAT, ASK), load):
        answer = app.post(path, body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unreachable")
        assert answer.headers["retry-after"] == "3"
        assert "x-should-retry" not in answer.headers


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_a_missing_field_is_named(app: Any, missing: str):
    answer = app.post(CHAT, {key: value for key, value in ASK.items() if key != missing})
    assert answer.json()["error"]["message"] == f"{missing} is missing"
    assert answer.status_code == 400


@pytest.mark.parametrize(
    "body, message",
    [
        (b"", "JSON object"),
        (b"{", "not JSON"),
        (b'{"a": 1,}', "not JSON"),
        (b"[1]", "JSON object"),
        (b"null", "JSON object"),
        (b'"text"', "JSON object"),
        (b"\xff\xfe{}", "not JSON"),
        (b'{"model": "\xff"}', "UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"model": "base", "x": ' + b"[" * 900 + b"]" * 900 + b"}", ""),
        (b'{"model": "base", "messages": [], "n": ' + b"9" * 5000 + b"}", ""),
        (b'{"model": "base", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "temperature"),
        (b'{"model": "base", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', "temperature"),
        (b'{"model": "base", "messages": [{"role": "user", "content": "x"}], "top_p": ' + b"9" * 400 + b"}", "top_p"),
        (b'{"model": "base", "messages": [{"role": "user", "content": "\\ud800"}]}', ""),
        (b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}', ""),
        (b'{"model": "base", "messages": [{"role": "\\ud800", "content": "x"}]}', ""),
        (b'{"model": "base", "messages": [{"role": "user", "content": "x"}], "stop": "\\ud800"}', "surrogate"),
    ],
)
def test_bodies_that_are_no_request(app: Any, body: bytes, message: str):
    answer = app.post(CHAT, body)
    assert 400 <= answer.status_code < 500, answer.text
    assert message in json.loads(answer.content)["error"]["message"]


def test_a_form_is_told_to_be_json(app: Any):
    async def send() -> Any:
        async with app.http() as client:
            return await client.post(CHAT, data={"model": "base"})

    answer = asyncio.run(send())
    assert answer.status_code == 400
    assert "application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"max_tokens": 301}, "up to 300"),
        ({"messages": [{"role": "user", "content": "x" * 450}]}, "up to 400"),
        ({"messages": [{"role": "user", "content": "x" * 350}], "max_tokens": 200}, "the context holds 512"),
    ],
)
def test_too_many_tokens(app: Any, fields: Any, message: str):
    answer = app.post(CHAT, {**ASK, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert message in error["message"]


def test_an_unknown_model_is_404(app: Any):
    async def ask() -> None:
        async with app.openai() as client:
            await client.chat.completions.create(model="sqll", messages=HELLO)

    with pytest.raises(openai.NotFoundError) as caught:
        asyncio.run(ask())
    assert caught.value.code == "model_not_found"
    assert "did you mean 'sql'" in caught.value.message
    assert app.leased == 0


@pytest.mark.parametrize(
    "path, message",
    [
        ("/v1/responses", "use /v1/chat/completions"),
        ("/v1/embeddings", "does not serve /v1/embeddings"),
        ("/v1/audio/transcriptions", "does not serve"),
        ("/v1/fine_tuning/jobs", "lorakit train"),
        ("/chat/completions", "must end with /v1"),
        ("/v1/chat/completion", "no such path: /v1/chat/completion; did you mean '/v1/chat/completions'?"),
        ("/nowhere", "no such path"),
    ],
)
def test_what_is_not_served_says_so(app: Any, path: str, message: str):
    answer = app.post(path, {})
    assert answer.status_code == 404
    assert message in answer.json()["error"]["message"]


def test_the_openai_client_raises_not_found_for_embeddings(app: Any):
    async def ask() -> None:
        async with app.openai() as client:
            await client.embeddings.create(model="base", input="x")

    with pytest.raises(openai.NotFoundError, match="embeddings"):
        asyncio.run(ask())


def test_a_wrong_method_is_405_with_the_right_one(app: Any):
    answer = app.get(CHAT)
    assert answer.status_code == 405
    assert answer.json()["error"]["message"] == f"{CHAT} answers POST, not GET"
    assert answer.headers["allow"] == "POST"


def test_a_fault_of_ours_is_500_without_its_text_is_not_retried_and_is_for_the_server_to_log():
    app = served()

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("/secret/path")

    app.engine.submit = broken  # type: ignore[method-assign]
    answer = app.post(CHAT, ASK)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["x-should-retry"] == "false"

    async def raises() -> None:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app.app), base_url="http://127.0.0.1") as client:
            await client.post(CHAT, json=ASK)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(raises())


def test_a_fault_in_a_stream_is_logged_and_ends_it_without_its_text(caplog: Any):
    app = served()

    def broken(work: Work) -> Ticket:
        ticket = Ticket(lambda: None)
        ticket.put(Piece((70,)))
        asyncio.get_running_loop().call_later(0.05, ticket.put, ZeroDivisionError("/secret/path"))
        return ticket

    app.engine.submit = broken  # type: ignore[method-assign]
    answer = app.post(CHAT, {**ASK, "stream": True})
    assert answer.text.endswith('"code":"internal_error"}}\n\n')
    assert "secret" not in answer.text
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("heals, tries", [(True, 3), (False, 1)])
def test_the_client_asks_again_only_for_what_can_heal(heals: bool, tries: int):
    from lorakit.serve.errors import EngineFailed

    app = served()
    count = 0

    def failing(*_: Any) -> None:
        nonlocal count
        count += 1
        raise EngineFailed("out of memory", heals)

    app.engine.submit = failing  # type: ignore[method-assign]

    async def ask() -> None:
        async with app.openai(retries=2) as client:
            await client.chat.completions.create(model="base", messages=HELLO)

    with pytest.raises(openai.InternalServerError):
        asyncio.run(ask())
    assert count == tries


def test_a_broken_adapter_names_the_problem():
    from lorakit.errors import AdapterError

    app = served()

    def lease(model: str, scale: float | None) -> Any:
        raise AdapterError("adapter 'sql': factors hold NaN")

    app.registry.lease = lease  # type: ignore[method-assign]
    answer = app.post(CHAT, {**ASK, "model": "sql"})
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": "adapter 'sql': factors hold NaN",
        "type": "invalid_request_error",
        "param": "model",
        "code": "adapter_refused",
    }


@pytest.mark.parametrize(
    "name, status, code, message",
    [("sq", 404, "model_not_found", "did you mean 'sql'?"), ("base", 400, None, "'base' is the base, which stays")],
)
def test_what_cannot_be_unloaded_names_its_field(app: Any, name: str, status: int, code: str | None, message: str):
    answer = app.post("/v1/unload_lora_adapter", {"lora_name": name})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, "lora_name", code)
    assert message in error["message"]
