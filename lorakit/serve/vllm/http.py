"""vLLM's calls: health, models, completions, and loading and unloading of adapters.

    GET  /health                     200 once it is ready, 503 when its engine has died
    GET  /v1/models                  the base with max_model_len, and the adapters
    POST /v1/completions             see `request` and `answer`; closing the connection aborts the request
    POST /v1/load_lora_adapter       {"lora_name", "lora_path"}; answers plain text
    POST /v1/unload_lora_adapter     {"lora_name"}

Its errors are objects as OpenAI's, with a status; `refusal` turns them into the engine's.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2

from ...errors import AdapterError, LorakitError
from ..engine import Piece, Work
from ..errors import Busy, Cannot, EngineFailed, UnknownAdapter
from . import answer, request
from .argv import BASE_NAME

_SECONDS = 60.0  # of one call, other than a completion; loading an adapter reads its file


class VllmClient:
    """Calls the vLLM that listens on a Unix socket. Close it with `aclose`."""

    def __init__(self, socket: str, key: str):
        # vLLM closes idle connections after 5 s: a request must not take one just then.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)
        self._http = httpx2.AsyncClient(
            transport=httpx2.AsyncHTTPTransport(uds=socket, limits=limits),
            base_url="http://vllm",
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx2.Timeout(_SECONDS, connect=5.0),
        )

    async def aclose(self) -> None:
        """Close all connections, which aborts what vLLM computes for them."""
        await self._http.aclose()

    async def healthy(self, seconds: float = 5.0) -> bool:
        """Whether it is up and its engine lives."""
        try:
            return (await self._http.get("/health", timeout=seconds)).status_code == 200
        except httpx2.HTTPError:
            return False

    async def context(self) -> int:
        """Return the positions for prompt and answer together."""
        with _connection():
            response = await self._http.get("/v1/models")
        if response.status_code != 200:
            raise refusal(response.status_code, response.content, None)
        with _understood("/v1/models", response.content):
            listed = response.json()["data"]
            return int(next(model["max_model_len"] for model in listed if model["id"] == BASE_NAME))

    async def load(self, name: str, path: Path) -> None:
        """Let vLLM read an adapter's folder. Raises AdapterError with vLLM's reason if it does not take it."""
        with _connection():
            response = await self._http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})
        if response.status_code == 200:
            return
        said = _message(response.content)
        if response.status_code == 400 and "already been loaded" in said:
            return  # a name is a hash of the contents: it is this adapter
        if response.status_code == 404 and "lora" not in said.lower():
            raise EngineFailed(
                "vLLM has no /v1/load_lora_adapter: it passes over VLLM_ALLOW_RUNTIME_LORA_UPDATING=1\n"
                "  update it in its environment: VENV/bin/pip install --upgrade vllm",
                heals=False,
            )
        raise AdapterError(f"vLLM does not load this adapter: {said.replace(str(path), 'its folder')}")

    async def unload(self, name: str) -> None:
        """Let vLLM forget an adapter.

        A failure is not an error here: recent versions answer 500 for an adapter that they have evicted already, and
        nobody can ask for the name any more.
        """
        with contextlib.suppress(httpx2.HTTPError):
            await self._http.post("/v1/unload_lora_adapter", json={"lora_name": name})

    async def complete(self, name: str, work: Work, ends: Collection[int]) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of an answer. Raises Cannot, Busy, UnknownAdapter or EngineFailed."""
        made = request.body(work, name, ends)
        stops = request.stops(work.sampling, ends)
        wait = httpx2.Timeout(None, connect=5.0, write=_SECONDS)  # the request's deadline bounds the rest
        with _connection():
            async with self._http.stream("POST", "/v1/completions", json=made, timeout=wait) as response:
                if response.status_code != 200:
                    raise refusal(response.status_code, await response.aread(), work, response.headers)
                events = answer.events(response.aiter_bytes())
                try:
                    async for piece in answer.pieces(events, stops, work.sampling.logprobs):
                        yield piece
                except answer.ErrorEvent as error:  # a schema that cannot be compiled comes in this way
                    raise refusal(_code(error.event), json.dumps(error.event).encode(), work) from error


def refusal(status: int, content: bytes, work: Work | None, headers: Any = None) -> LorakitError:
    """Return the error for a status other than 200. work: what was asked for, None for other calls."""
    said = _message(content)
    if status == 404:
        return UnknownAdapter(f"vLLM does not have this adapter (any more): {said}")
    if status in (429, 503):
        return Busy(f"vLLM takes no more requests: {said}", _seconds(headers))
    if status in (400, 413, 422) and work is not None:
        what = _parameter(content) or ("schema" if work.sampling.schema is not None else "request")
        return Cannot(f"vLLM refuses this request: {said}", {"structured_outputs": "schema"}.get(what, what))
    return EngineFailed(f"vLLM answered with status {status}: {said}", heals=status >= 500)


def _message(content: bytes) -> str:
    try:
        found = json.loads(content)
    except ValueError:
        return content[:500].decode("utf8", "replace") or "(an empty body)"
    return answer.message_of(found) if isinstance(found, dict) else str(found)[:500]


def _parameter(content: bytes) -> str | None:
    """Return the name of the parameter that an error is about, if vLLM says so."""
    try:
        found = json.loads(content)
    except ValueError:
        return None
    error = found.get("error", found) if isinstance(found, dict) else None
    param = error.get("param") if isinstance(error, dict) else None
    return param if isinstance(param, str) and param else None


def _code(event: Mapping[str, Any]) -> int:
    """Return the status that an error within a stream would have had; 500 if it does not say."""
    error = event.get("error")
    code = (error if isinstance(error, dict) else event).get("code")
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def _seconds(headers: Any) -> float:
    """Return what Retry-After says, at most a minute."""
    try:
        return min(max(float(headers["retry-after"]), 0.1), 60.0)
    except (KeyError, TypeError, ValueError):
        return 1.0


@contextlib.contextmanager
def _connection() -> Iterator[None]:
    """Turn a broken connection inside the block into EngineFailed."""
    try:
        yield
    except httpx2.HTTPError as error:
        raise EngineFailed(f"the connection to vLLM broke: {type(error).__name__} {error}".rstrip()) from error


@contextlib.contextmanager
def _understood(call: str, content: bytes) -> Iterator[None]:
    """Turn an answer of another form than vLLM's into EngineFailed."""
    try:
        yield
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise EngineFailed(f"{call} is not as vLLM answers: {content[:200]!r}", heals=False) from error
