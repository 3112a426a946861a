"""The client of OpenAI-compatible servers: what it sends, what it reads, and what it says when that fails."""

from __future__ import annotations

import httpx2
import openai_stub
import pytest

from lorakit.errors import ConfigError
from lorakit.serve import client as client_module
from lorakit.serve.client import Answer, Client, GenerationSettings, Served, ServerError

MESSAGES = [{"role": "user", "content": "Ada: 3"}]


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in ("LORAKIT_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def waits(monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr(client_module.time, "sleep", waited.append)
    return waited


def answering(*responses: httpx2.Response) -> Client:
    """A client whose requests get these responses in turn."""
    left = iter(responses)
    return Client("http://server", transport=httpx2.MockTransport(lambda request: next(left)))


def test_models_and_answers():
    with openai_stub.serving(lambda path, body: f"{body['model']} says hi") as stub:
        client = Client(stub.url + "/")
        assert client.models() == [Served("base"), Served("sql", "base")]
        assert client.answer("sql", MESSAGES, GenerationSettings(max_tokens=4, temperature=0.0)) == Answer(
            "sql says hi"
        )
        assert client.answer("sql", "Once", GenerationSettings()) == Answer("sql says hi")
        assert [path for path, _, _ in stub.asked] == ["/v1/models", "/v1/chat/completions", "/v1/completions"]
        assert stub.asked[1][1] == {"model": "sql", "messages": MESSAGES, "max_tokens": 4, "temperature": 0.0}
        assert stub.asked[2][1] == {"model": "sql", "prompt": "Once"}
        assert "authorization" not in {name.lower() for name in stub.asked[1][2]}


def key_sent(url: str) -> str | None:
    """The key that a client of this URL sends."""
    sent: list[str | None] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        sent.append(request.headers.get("authorization"))
        return httpx2.Response(200, json={"data": []})

    Client(url, transport=httpx2.MockTransport(handler)).models()
    return sent[0]


def test_openais_key_is_sent_to_openai_alone_and_lorakits_to_all(monkeypatch):
    """Most developers have OPENAI_API_KEY set; `--server http://colleague:8000` must not get it."""
    monkeypatch.setenv("OPENAI_API_KEY", "openais")
    assert key_sent("https://api.openai.com/v1") == "Bearer openais"
    for url in ("http://colleague:8000", "http://api.openai.com", "https://api.openai.com.evil.example", "http://b/v1"):
        assert key_sent(url) is None
    monkeypatch.setenv("OPENAI_BASE_URL", "http://b/v1/")
    assert key_sent("http://b") == "Bearer openais"
    assert key_sent("http://colleague:8000") is None
    monkeypatch.setenv("LORAKIT_API_KEY", "ours")
    assert key_sent("http://colleague:8000") == key_sent("http://b") == "Bearer ours"


@pytest.mark.parametrize("prompt", [MESSAGES, "Once"], ids=["chat", "text"])
def test_streams_are_the_answer_in_pieces(prompt):
    with openai_stub.serving(lambda path, body: "one two three") as stub:
        assert list(Client(stub.url).stream("base", prompt, GenerationSettings())) == ["one", " two", " three"]


def test_a_stream_that_breaks_off_is_an_error_after_its_pieces():
    with openai_stub.serving(lambda path, body: "one two three") as stub:
        stub.break_stream_after = 2
        pieces = Client(stub.url).stream("base", MESSAGES, GenerationSettings())
        assert [next(pieces), next(pieces)] == ["one", " two"]
        with pytest.raises(ServerError, match="broke"):
            next(pieces)


def test_an_error_within_a_stream_is_raised():
    text = 'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'
    text += 'event: error\ndata: {"error": {"message": "no memory"}}\n\n'
    pieces = answering(httpx2.Response(200, text=text)).stream("base", MESSAGES, GenerationSettings())
    assert next(pieces) == "a"
    with pytest.raises(ServerError, match="no memory"):
        next(pieces)


def test_tool_calls_are_part_of_the_text():
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    response = httpx2.Response(200, json={"choices": [{"message": message, "finish_reason": "tool_calls"}]})
    assert (
        answering(response).answer("base", MESSAGES, GenerationSettings()).text
        == '{"name": "f", "arguments": "{\\"x\\": 1}"}'
    )


def test_a_busy_server_is_asked_again_when_it_says(waits):
    busy = httpx2.Response(429, headers={"retry-after": "2.5"}, json={"error": {"message": "busy"}})
    fine = httpx2.Response(200, json={"choices": [{"text": "a", "finish_reason": "length"}]})
    assert answering(busy, busy, fine).answer("base", "x", GenerationSettings()) == Answer("a", cut=True)
    assert waits == [2.5, 2.5]


def test_a_stream_waits_for_a_busy_server_too(waits):
    busy = httpx2.Response(429, headers={"retry-after": "1.5"}, json={"error": {"message": "busy"}})
    fine = httpx2.Response(200, text='data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n')
    assert list(answering(busy, fine).stream("base", "x", GenerationSettings())) == ["a"]
    assert waits == [1.5]


def test_asking_again_has_an_end(waits):
    busy = [httpx2.Response(503, headers={"retry-after": "100000"}, json={"error": {"message": "full"}})] * 5
    with pytest.raises(ServerError, match="answered 503: full") as caught:
        answering(*busy).answer("base", "x", GenerationSettings())
    assert caught.value.status == 503
    assert waits == [client_module.LONGEST_WAIT] * 4


def test_a_server_that_says_no_is_not_asked_again(waits):
    response = httpx2.Response(503, headers={"x-should-retry": "false"}, json={"error": {"message": "broken"}})
    with pytest.raises(ServerError, match="broken"):
        answering(response).answer("base", "x", GenerationSettings())
    assert waits == []


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (
            httpx2.Response(401, json={"error": {"message": "no key"}}),
            "401: no key\n  it needs a key: set .*LORAKIT_API",
        ),
        (httpx2.Response(404, text="<html>"), "404: <html>\n  expected the address of an OpenAI-compatible server"),
        (httpx2.Response(404, json={"error": {"message": "no model 'x'"}}), "404: no model 'x'$"),
        (httpx2.Response(302, headers={"location": "https://b/"}), "redirects to https://b/"),
        (httpx2.Response(200, text="<html>"), "in a form that is not OpenAI's"),
        (httpx2.Response(200, json={"choices": []}), "in a form that is not OpenAI's"),
        (httpx2.Response(200, json=[]), "in a form that is not OpenAI's"),
        (httpx2.Response(400, json={"detail": "bad"}), "400: .*bad"),
    ],
)
def test_refusals_and_other_answers_say_what_came(response, message):
    with pytest.raises(ServerError, match=message):
        answering(response).answer("base", "x", GenerationSettings())


def test_a_server_that_is_not_there():
    with pytest.raises(ServerError, match=r"no server answers at http://127.0.0.1:1/v1 .*\n  start one: lorakit serve"):
        Client("http://127.0.0.1:1").models()
    with pytest.raises(ConfigError, match=r"expected a URL, such as http://127\.0\.0\.1:8000"):
        Client("127.0.0.1:8000")


def test_a_server_that_is_too_slow():
    def handler(request):
        raise httpx2.ReadTimeout("slow", request=request)

    with pytest.raises(ServerError, match="did not answer in time"):
        Client("http://server", transport=httpx2.MockTransport(handler)).models()
