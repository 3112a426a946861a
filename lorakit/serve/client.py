"""Ask an OpenAI-compatible server: lorakit's own, vLLM's, llama.cpp's, Ollama's, or a provider's.

    client = Client("http://127.0.0.1:8000")
    client.models()                                                  # names, as the server lists them
    client.answer("sql", [{"role": "user", "content": "..."}], GenerationSettings(max_tokens=64)).text
    for piece in client.stream("sql", messages, GenerationSettings()): ...

For `lorakit chat --server` and `lorakit eval --server`. A prompt is a conversation, or a text to be continued.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..errors import ConfigError, LorakitError

if TYPE_CHECKING:
    import httpx2

KEY = "LORAKIT_API_KEY"  # environment variables
OPENAI_KEY, OPENAI_URL = "OPENAI_API_KEY", "OPENAI_BASE_URL"
OPENAI_HOST = "api.openai.com"
TRIES = 5
LONGEST_WAIT = 60.0  # seconds between two tries
Prompt = str | Sequence[Mapping[str, Any]]  # a text to continue, or a conversation


class ServerError(LorakitError, RuntimeError):
    """A server is out of reach, refuses, or answers in another form. `status`: None if it did not answer."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class GenerationSettings:
    """How a server is to answer; None leaves a setting to the server."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Answer:
    """A text, and whether the limit of new tokens ended it."""

    text: str
    cut: bool = False


@dataclass(frozen=True)
class Served:
    """A model of a server. parent: the base that an adapter is on; None for a base, or if the server does not say."""

    name: str
    parent: str | None = None


class Client:
    """A server at a URL, with or without `/v1`. May be used from several threads."""

    def __init__(
        self, url: str, key: str | None = None, seconds: float = 600.0, transport: httpx2.BaseTransport | None = None
    ):
        """key: by default LORAKIT_API_KEY of the environment, for OpenAI's server OPENAI_API_KEY.

        seconds: to wait for each part of an answer. transport: another way to reach the server, for tests.
        """
        http = _http()
        self.url = _base_url(url)
        key = key or _key_for(self.url)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._has_key = key is not None
        self._http = http.Client(headers=headers, timeout=http.Timeout(seconds, connect=10), transport=transport)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def models(self) -> list[Served]:
        """Return what the server offers, in its order. Raises ServerError."""
        listed = self._json("GET", "/models", None)
        try:
            return [Served(str(model["id"]), model.get("parent")) for model in listed["data"]]
        except (KeyError, TypeError, AttributeError):
            raise self._unreadable("/models") from None

    def answer(
        self, model: str, prompt: Prompt, how: GenerationSettings, tools: Sequence[Mapping[str, Any]] = ()
    ) -> Answer:
        """Return the answer to a prompt. Raises ServerError."""
        path, body = _request(model, prompt, how, tools)
        answered = self._json("POST", path, body)
        try:
            choice = answered["choices"][0]
            text = choice["text"] if isinstance(prompt, str) else _of_message(choice["message"])
            return Answer(text, choice.get("finish_reason") == "length")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self._unreadable(path) from None

    def stream(self, model: str, prompt: Prompt, how: GenerationSettings) -> Iterator[str]:
        """Yield the answer's text as it arrives. Raises ServerError, also in the middle of an answer."""
        path, body = _request(model, prompt, how, ())
        with self._answered("POST", path, body | {"stream": True}) as response:
            for line in response.iter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                yield from self._pieces(path, data)
        raise ServerError(f"{self.url}{path}: the answer broke off before its end")

    def _pieces(self, path: str, data: str) -> Iterator[str]:
        try:
            event = json.loads(data)
            if "error" in event:
                raise ServerError(f"{self.url}{path}: {_message(event)}")
            for choice in event["choices"][:1]:
                piece = choice["text"] if "text" in choice else choice["delta"].get("content")
                if piece:
                    yield piece
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self._unreadable(path) from None

    def _json(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        with self._answered(method, path, body) as response:
            response.read()
            try:
                return response.json()
            except ValueError:
                raise self._unreadable(path) from None

    @contextmanager
    def _answered(self, method: str, path: str, body: dict[str, Any] | None) -> Iterator[httpx2.Response]:
        """Give the response, which is not read yet, asking again where the server says that this can help."""
        for tried in range(1, TRIES + 1):
            with self._errors(), self._http.stream(method, self.url + path, json=body) as response:
                if response.status_code == 200:
                    yield response
                    return
                response.read()
            heals = response.status_code in (429, 503) and response.headers.get("x-should-retry") != "false"
            if not heals or tried == TRIES:
                raise self._refused(response)
            time.sleep(min(_wait(response.headers.get("retry-after"), tried), LONGEST_WAIT))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        http = _http()
        try:
            yield
        except http.TimeoutException as error:
            raise ServerError(f"{self.url} did not answer in time ({type(error).__name__})") from error
        except http.ConnectError as error:
            raise ServerError(
                f"no server answers at {self.url} ({error})\n"
                "  start one: lorakit serve BASE --adapter NAME=PATH; or check --server"
            ) from error
        except http.HTTPError as error:
            raise ServerError(f"{self.url}: the connection broke: {error}") from error

    def _refused(self, response: httpx2.Response) -> ServerError:
        try:
            said = _message(response.json())
        except (ValueError, TypeError, AttributeError):
            said = response.text[:200].strip()
        status, hint = response.status_code, ""
        if status in (401, 403):
            problem = "the key was not accepted: check" if self._has_key else "it needs a key: set"
            hint = f"\n  {problem} the environment variable {KEY}"
        elif status == 404 and "error" not in response.text:
            hint = "\n  expected the address of an OpenAI-compatible server, such as http://127.0.0.1:8000"
        elif 300 <= status < 400:
            hint = f"\n  it redirects to {response.headers.get('location')}: give that address"
        return ServerError(f"{self.url} answered {status}: {said}{hint}", status)

    def _unreadable(self, path: str) -> ServerError:
        return ServerError(
            f"{self.url}{path} answered in a form that is not OpenAI's\n"
            "  expected the address of an OpenAI-compatible server, such as http://127.0.0.1:8000"
        )


def _http() -> Any:
    try:
        import httpx2
    except ImportError as error:
        raise ConfigError("asking a server needs httpx2\n  pip install 'lorakit[serve]'") from error
    return httpx2


def _key_for(url: str) -> str | None:
    """Return the environment's key for a server. OpenAI's own is for OpenAI, or the server it was set up for."""
    if os.environ.get(KEY):
        return os.environ[KEY]
    set_up = os.environ.get(OPENAI_URL)
    is_openais = urlsplit(url).hostname == OPENAI_HOST and url.startswith("https://")
    if is_openais or (set_up and url == set_up.rstrip("/")):
        return os.environ.get(OPENAI_KEY) or None
    return None


def _base_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--server {url}: expected a URL, such as http://127.0.0.1:8000")
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def _request(
    model: str, prompt: Prompt, how: GenerationSettings, tools: Sequence[Mapping[str, Any]]
) -> tuple[str, dict[str, Any]]:
    settings = {
        "max_tokens": how.max_tokens,
        "temperature": how.temperature,
        "top_p": how.top_p,
        "seed": how.seed,
        "tools": list(tools) or None,
    }
    body: dict[str, Any] = {"model": model} | {name: value for name, value in settings.items() if value is not None}
    if isinstance(prompt, str):
        return "/completions", body | {"prompt": prompt}
    return "/chat/completions", body | {"messages": [dict(message) for message in prompt]}


def _of_message(message: Mapping[str, Any]) -> str:
    """Return a message's text; its tool calls as JSON, one a line, where it makes some."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join([*([message["content"]] if message.get("content") else []), *calls])


def _message(body: Any) -> str:
    error = body["error"] if "error" in body else body
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _wait(retry_after: str | None, tried: int) -> float:
    try:
        return max(0.0, float(retry_after or ""))
    except ValueError:
        return float(min(2**tried, 30)) / 2
