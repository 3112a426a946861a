"""/v1/chat/completions through the real openai client, whole and streamed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
import tiny_lm
from served_app import ASK, HELLO, Exchange, ids, served, tokenizer

from lorakit.serve.engine import Piece, Work
from lorakit.serve.errors import EngineFailed
from lorakit.serve.ticket import Ticket


def chat(app: Any, **fields: Any) -> Any:
    async def ask() -> Any:
        async with app.openai() as client:
            return await client.chat.completions.create(**{"model": "base", "messages": HELLO, **fields})

    return asyncio.run(ask())


def streamed(app: Any, **fields: Any) -> list[Any]:
    async def ask() -> list[Any]:
        async with app.openai() as client:
            stream = await client.chat.completions.create(
                **{"model": "base", "messages": HELLO, "stream": True, **fields}
            )
            return [chunk async for chunk in stream]

    return asyncio.run(ask())


def test_an_answer_has_the_openai_clients_form_with_counted_tokens():
    app = served("Hello!")
    answer = chat(app)
    assert answer.choices[0].message.content == "Hello!"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    assert (answer.object, answer.model) == ("chat.completion", "base")
    # "<user>Hi<assistant>" is 19 bytes, a token each.
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (19, 6, 25)
    assert tokenizer().decode(app.engine.works[0].ids) == "<user>Hi<assistant>"


def test_fields_reach_the_engine():
    app = served()
    chat(
        app,
        model="sql",
        max_completion_tokens=5,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        logit_bias={"7": -100},
        extra_body={
            "top_k": 4,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "lorakit": {"scale": 0.5},
            "stop_token_ids": [9],
        },
    )
    work = app.engine.works[0]
    how = work.sampling
    assert work.choice == ((app.registry.get("sql").key, 0.5),)
    assert (how.max_tokens, how.temperature, how.top_p, how.seed, how.top_k, how.min_p) == (5, 0.5, 0.9, 3, 4, 0.05)
    assert (how.presence, how.frequency, how.repetition, how.logit_bias) == (0.1, 0.2, 1.1, ((7, -100.0),))
    assert how.stop_ids == {tiny_lm.EOS, 9}
    assert work.deadline is not None


def test_defaults_are_openais_and_the_answer_may_fill_the_context():
    app = served(context=100)
    chat(app)
    how = app.engine.works[0].sampling
    assert (how.temperature, how.top_p, how.top_k, how.logprobs, how.schema, how.seed) == (1, 1, 0, None, None, None)
    assert how.max_tokens == 100 - 19


def test_a_stream_begins_with_the_role_and_ends_with_reason_and_usage():
    chunks = streamed(served("Hé!"), stream_options={"include_usage": True})
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.content for chunk in chunks[1:-2]] == ["H", "é", "!"]
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-2].choices[0].delta.content is None
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 4
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.object == "chat.completion.chunk" and chunk.model == "base" for chunk in chunks)


def test_without_include_usage_no_chunk_mentions_it():
    chunks = served().events("/v1/chat/completions", ASK)
    assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize("text", ["", "a", "naïve 🙂 日本語", "stop STOP here", "one\ntwo STO three", "tail ST"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stop", [None, "STOP", ["!", "two"]])
def test_a_stream_joined_is_the_answer_in_one(text: str, n: int, stop: Any):
    def answer(work: Work) -> list[int]:
        return ids(text + str(work.sampling.seed))

    fields = {**ASK, "n": n, "stop": stop, "seed": 5}
    whole = served(answer).post("/v1/chat/completions", fields).json()
    joined, reasons = [""] * n, [None] * n
    for chunk in served(answer).events("/v1/chat/completions", fields):
        for choice in chunk["choices"]:
            joined[choice["index"]] += choice["delta"].get("content") or ""
            reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
    assert joined == [choice["message"]["content"] for choice in whole["choices"]]
    assert reasons == [choice["finish_reason"] for choice in whole["choices"]]
    assert len(set(joined)) == n or (stop and n > 1)


def test_a_stop_text_ends_the_answer_and_cancels_it():
    app = served("one STOP two")
    answer = chat(app, stop="STOP")
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("one ", "stop")
    assert app.engine.cancelled == 1


def test_several_answers_have_seeds_of_their_own():
    app = served()
    assert len(chat(app, n=3, seed=2**63 - 1).choices) == 3
    assert [work.sampling.seed for work in app.engine.works] == [2**63 - 1, 0, 1]


def test_length_is_said():
    answer = chat(served("Hello"), max_tokens=3)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hel", "length")


def test_ignore_eos_goes_on():
    answer = chat(served(lambda work: [*ids("ab"), *ids("c")]), max_tokens=4, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 4


def test_log_probabilities_whole_and_streamed():
    fields = {"logprobs": True, "top_logprobs": 2}
    answer = chat(served("é!"), **fields)
    found = answer.choices[0].logprobs.content
    assert [token.logprob for token in found] == [-0.5, -0.5, -0.5]
    assert bytes(b for token in found for b in token.bytes) == "é!".encode()
    assert [len(token.top_logprobs) for token in found] == [2, 2, 2]
    assert found[2].token == "!"
    assert found[2].top_logprobs[0].token == "!"
    chunks = streamed(served("é!"), **fields)
    tokens = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [t.model_dump() for t in tokens] == [t.model_dump() for t in found]
    assert chat(served(), logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_headers_name_the_adapters_version_and_what_had_no_effect():
    app = served()
    body = {**ASK, "model": "sql", "temprature": 0, "user": "me", "verbosity": "low", "x\r\ny: z": 1}
    answer = app.post("/v1/chat/completions", body)
    assert answer.status_code == 200
    version = app.registry.get("sql").version
    assert version.startswith("sql@")
    assert answer.headers["x-lorakit-adapter"] == version
    warning = answer.headers["x-lorakit-warning"]
    assert warning == "not used: temprature (did you mean temperature?), verbosity, x%0D%0Ay: z"
    stream = app.post("/v1/chat/completions", {**body, "stream": True})
    assert stream.headers["x-lorakit-adapter"] == version
    mix = app.post("/v1/chat/completions", {**ASK, "model": "chat:0.3+sql:0.7"})
    assert mix.headers["x-lorakit-adapter"] == f"{version}+{app.registry.get('chat').version}"
    assert mix.json()["model"] == "chat:0.3+sql:0.7"
    assert [weight for _, weight in sorted(app.engine.works[-1].choice, key=lambda part: part[1])] == [0.3, 0.7]
    assert "x-lorakit-warning" not in app.post("/v1/chat/completions", {**ASK, "user": "me", "store": True}).headers


@pytest.mark.parametrize("fields", [{"model": "sql:0"}, {"model": "sql", "lorakit": {"scale": 0}}])
def test_what_has_no_weight_is_not_said_to_answer(fields: Any):
    app = served()
    answer = app.post("/v1/chat/completions", {**ASK, **fields})
    assert (answer.status_code, app.engine.works[-1].choice) == (200, ())
    assert "x-lorakit-adapter" not in answer.headers
    mix = app.post("/v1/chat/completions", {**ASK, "model": "sql:0+chat:0.5"})
    assert mix.headers["x-lorakit-adapter"] == app.registry.get("chat").version


def test_what_is_not_read_deep_within_a_request_is_named_too():
    app = served()
    body = {
        **ASK,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "x"}}]}],
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "response_format": {"type": "text", "strict": True},
        "tools": [{**WEATHER, "custom": {"a": 1}, "function": {**WEATHER["function"], "strict": True}}],
        "modalities": ["text"],
        "guided_json": None,
    }
    answer = app.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-lorakit-warning"] == (
        "not used: stream_options.continuous_usage_stats, response_format.strict, "
        "messages[0].content[0].cache_control, tools[0].custom, tools[0].function.strict"
    )
    called = app.post("/v1/chat/completions", {**ASK, "tools": body["tools"][:1], "tool_choice": "required"})
    assert called.headers["x-lorakit-warning"] == "not used: tools[0].custom"


def test_a_format_beside_a_demanded_call_is_said_to_have_no_effect():
    app = served('[{"name": "weather", "arguments": {"city": "Rome"}}]')
    body = {**ASK, "tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}}
    answer = app.post("/v1/chat/completions", body)
    assert answer.json()["choices"][0]["finish_reason"] == "tool_calls"
    assert answer.headers["x-lorakit-warning"] == "response_format is not used: a call is demanded"
    assert app.post("/v1/chat/completions", {**body, "tool_choice": "none"}).status_code == 200
    assert app.engine.works[-1].sampling.schema == '{"type": "object"}'


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_is_demanded_comes_back_as_one(choice: Any):
    app = served('[{"name": "weather", "arguments": {"city": "Rome"}}]')
    answer = chat(app, tools=[WEATHER], tool_choice=choice)
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Rome"})
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None
    assert "weather" in app.engine.works[0].sampling.schema
    chunks = streamed(app, tools=[WEATHER], tool_choice=choice)
    calls = [call for chunk in chunks for call in (chunk.choices[0].delta.tool_calls or ())]
    assert [call.function.name for call in calls if call.function.name] == ["weather"]
    assert json.loads("".join(call.function.arguments or "" for call in calls)) == {"city": "Rome"}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_call_in_the_familys_syntax_is_read_and_its_result_is_answered():
    app = served('Let me see. <tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>')
    answer = chat(app, tools=[WEATHER])
    (call,) = answer.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Rome"}
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Let me see.", "tool_calls")
    assert app.engine.works[0].sampling.schema is None
    chunks = streamed(app, tools=[WEATHER])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Let me see."
    calls = [call for chunk in chunks for call in (chunk.choices[0].delta.tool_calls or ())]
    assert calls[0].function.name == "weather"
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    said = answer.choices[0].message.model_dump(exclude_none=True)
    chat(app, messages=[*HELLO, said, result], tools=[WEATHER])
    assert "<tool>sunny<assistant>" in tokenizer().decode(app.engine.works[-1].ids)
    text = chat(app, tools=[WEATHER], tool_choice="none").choices[0]
    assert "<tool_call>" in text.message.content
    assert text.finish_reason == "stop"


def test_one_call_only_if_asked_so():
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    app = served(call * 2 + "x" * 50)
    assert len(chat(app, tools=[WEATHER]).choices[0].message.tool_calls) == 2
    answer = chat(app, tools=[WEATHER], parallel_tool_calls=False).choices[0]
    assert len(answer.message.tool_calls) == 1
    assert answer.finish_reason == "tool_calls"
    assert app.engine.cancelled == 1


def test_a_schema_reaches_the_engine():
    app = served("{}")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    chat(app, response_format=form)
    assert json.loads(app.engine.works[0].sampling.schema) == schema
    chat(app, response_format={"type": "text"})
    assert app.engine.works[1].sampling.schema is None


def test_an_error_before_the_first_token_has_a_status_and_one_after_it_is_in_the_stream():
    app = served("Hello")
    app.engine.fail_after = 0
    with pytest.raises(openai.InternalServerError, match="script"):
        streamed(app)
    app.engine.fail_after = 2
    chunks: list[str] = []

    async def read() -> None:
        async with app.openai() as client:
            async for chunk in await client.chat.completions.create(**ASK, stream=True):  # type: ignore[call-overload]
                chunks.append(chunk.choices[0].delta.content or "")

    with pytest.raises(openai.APIError, match="script"):
        asyncio.run(read())
    assert "".join(chunks) == "He"
    raw = app.post("/v1/chat/completions", {**ASK, "stream": True}).text
    assert "event: error\ndata: " in raw
    assert "[DONE]" not in raw


def test_tokens_that_wait_are_sent_together_and_none_is_lost_before_an_error():
    """An engine that is faster than the socket costs no write a token."""

    async def stream(*pieces: Any) -> list[dict[str, Any]]:
        app = served()

        def submit(work: Work) -> Ticket:
            ticket = Ticket(lambda: None)
            for token in ids("Hel", end=False):
                ticket.put(Piece((token,)))

            def more() -> None:
                for token in ids("lo!", end=False):
                    ticket.put(Piece((token,)))
                ticket.put(pieces[0])

            asyncio.get_running_loop().call_later(0.05, more)
            return ticket

        app.engine.submit = submit  # type: ignore[method-assign]
        exchange = Exchange(app.app, "/v1/chat/completions", {**ASK, "stream": True})
        await exchange.run()
        return [message for message in exchange.sent if message.get("body")]

    sent = asyncio.run(stream(Piece((), finish="stop")))
    assert [message["body"].count(b'"content":') for message in sent] == [4, 3]  # the first with the role
    sent = asyncio.run(stream(EngineFailed("out of memory")))
    assert b'"content":"l"' in sent[1]["body"]
    assert b'"content":"!"' in sent[1]["body"]
    assert sent[1]["body"].index(b'"!"') < sent[1]["body"].index(b"event: error")


def test_a_full_server_is_429_with_when_to_come_back():
    app = served()
    app.engine.busy = True
    with pytest.raises(openai.RateLimitError) as caught:
        chat(app, model="sql")
    assert caught.value.response.headers["retry-after"] == "2"
    assert caught.value.response.headers["retry-after-ms"] == "2000"
    assert app.leased == 0


def test_if_one_of_several_answers_finds_no_place_none_is_computed():
    app = served("Hello" * 20)
    submit = app.engine.submit

    def third_is_refused(work: Work) -> Any:
        app.engine.busy = len(app.engine.works) == 2
        return submit(work)

    app.engine.submit = third_is_refused  # type: ignore[method-assign]
    with pytest.raises(openai.RateLimitError):
        chat(app, n=3)
    assert app.engine.cancelled == 2 or not app.engine._tasks


@pytest.mark.parametrize("finish, status", [("timeout", 504), ("cancelled", 503)])
def test_an_answer_without_an_end_is_an_error(finish: Any, status: int):
    app = served()

    def submit(work: Work) -> Ticket:
        ticket = Ticket(lambda: None)
        ticket.put(Piece((70,)))
        ticket.put(Piece((), finish=finish))
        return ticket

    app.engine.submit = submit  # type: ignore[method-assign]
    answer = app.post("/v1/chat/completions", ASK)
    assert answer.status_code == status
    assert answer.headers.get("x-should-retry") == ("false" if finish == "timeout" else None)
