"""What other people's clients make of our answers: openai's over a socket, LangChain's and LiteLLM's parsing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from served_app import HELLO, ids, live, served

from lorakit.serve.engine import Work

TEXT = "Grüße aus Köln 🙂!"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = '[{"name": "weather", "arguments": {"city": "Rome"}}]'


def answer(work: Work) -> list[int]:
    return ids(CALL if work.sampling.schema else TEXT)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with live(served(answer).app) as address:
        yield f"{address}/v1"


def test_openais_client_over_a_socket(url: str):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        assert client.chat.completions.create(model="sql", messages=HELLO).choices[0].message.content == TEXT
        chunks = list(client.chat.completions.create(model="sql", messages=HELLO, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
        with client.chat.completions.stream(model="sql", messages=HELLO) as stream:
            assert stream.get_final_completion().choices[0].message.content == TEXT
        text = client.completions.create(model="base", prompt="Once", stream=True, max_tokens=50)
        assert "".join(chunk.choices[0].text for chunk in text) == TEXT
        called = client.chat.completions.create(model="sql", messages=HELLO, tools=TOOLS, tool_choice="required")
        assert called.choices[0].message.tool_calls[0].function.name == "weather"
        raw = client.chat.completions.with_raw_response.create(model="sql", messages=HELLO)
        assert raw.headers["x-lorakit-adapter"].startswith("sql@")


def test_langchain_reads_answers_streams_usage_and_calls(url: str):
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(model="sql", base_url=url, api_key="none", max_retries=0, stream_usage=True)
    whole = model.invoke("Hi")
    assert whole.content == TEXT
    assert whole.usage_metadata["output_tokens"] == len(TEXT.encode())
    joined = None
    for chunk in model.stream("Hi"):
        joined = chunk if joined is None else joined + chunk
    assert joined.content == TEXT
    assert joined.usage_metadata["output_tokens"] == len(TEXT.encode())
    assert joined.response_metadata["finish_reason"] == "stop"
    bound = model.bind_tools(TOOLS, tool_choice="required")
    assert bound.invoke("Hi").tool_calls[0]["args"] == {"city": "Rome"}
    joined = None
    for chunk in bound.stream("Hi"):
        joined = chunk if joined is None else joined + chunk
    assert joined.tool_calls[0]["args"] == {"city": "Rome"}


def test_litellm_reads_answers_and_rebuilds_streams(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(os.environ, "LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    ask: dict[str, Any] = {"model": "openai/sql", "api_base": url, "api_key": "none", "messages": HELLO}
    assert litellm.completion(**ask).choices[0].message.content == TEXT
    chunks = list(litellm.completion(**ask, stream=True, stream_options={"include_usage": True}))
    rebuilt = litellm.stream_chunk_builder(chunks, messages=HELLO)
    assert rebuilt.choices[0].message.content == TEXT
    assert rebuilt.usage.completion_tokens == len(TEXT.encode())
    chunks = list(litellm.completion(**ask, stream=True, tools=TOOLS, tool_choice="required"))
    call = litellm.stream_chunk_builder(chunks, messages=HELLO).choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Rome"}
    # Its health check is a chat completion of one token.
    assert litellm.completion(**ask, max_tokens=1).choices[0].finish_reason == "length"
