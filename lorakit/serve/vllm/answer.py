"""vLLM's streamed answer -> pieces.

    data: {"choices": [{"token_ids": [17, 4], "logprobs": {...}, "finish_reason": null}]}
    data: {"choices": [{"token_ids": [2], "finish_reason": "stop", "stop_reason": 2}]}     2 is not part of the answer
    data: {"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 16}}}
    data: [DONE]

vLLM says how much of the prompt was cached at the end only, so that `cached` comes with the last piece.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator, Collection, Mapping
from typing import Any

from ..engine import Finish, Piece, TokenLogprob
from ..errors import EngineFailed

_FINISH: Mapping[str, Finish] = {"stop": "stop", "length": "length"}
_MARK = "token_id:"
LONGEST = 16 << 20  # bytes of one event; the first repeats the prompt's ids


class ErrorEvent(Exception):
    """vLLM sent an error within the stream. `event`: its object."""

    def __init__(self, event: Mapping[str, Any]):
        super().__init__(message_of(event))
        self.event = event


async def events(chunks: AsyncIterable[bytes]) -> AsyncIterator[dict[str, Any]]:
    """Yield the objects of a stream of server-sent events, up to [DONE]. Raises EngineFailed if it breaks off.

    Lines end at line feeds alone: a JSON text may hold U+2028 and others that `str.splitlines` splits at.
    """
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > LONGEST:
            raise EngineFailed(f"vLLM sent a line of more than {LONGEST:,} bytes")
        for line in lines:
            data = line.strip()
            if not data.startswith(b"data:"):
                continue
            data = data.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            yield _object(data)
    raise EngineFailed("vLLM's answer broke off in the middle")


def _object(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError as error:
        raise EngineFailed(f"vLLM sent an event that is not JSON: {data[:80]!r}") from error
    if not isinstance(event, dict):
        raise EngineFailed(f"vLLM sent an event that is not an object: {data[:80]!r}")
    return event


async def pieces(
    stream: AsyncIterable[dict[str, Any]], stops: Collection[int], logprobs: int | None
) -> AsyncIterator[Piece]:
    """Yield the pieces of an answer. stops: ids that end it. logprobs: alternatives asked for, None without.

    Raises ErrorEvent for an error within the stream, EngineFailed for what makes no sense.
    """
    finish: Finish | None = None
    cached = 0
    async for event in stream:
        if "error" in event:
            raise ErrorEvent(event)
        try:
            for choice in event["choices"]:
                ended = choice.get("finish_reason")
                ids, probabilities = _tokens(choice, logprobs)
                if ended == "stop" and ids and (ids[-1] in stops or ids[-1] == choice.get("stop_reason")):
                    ids, probabilities = ids[:-1], probabilities[: len(ids) - 1]
                if ids:
                    yield Piece(ids, probabilities)
                if ended is not None:
                    if ended not in _FINISH:
                        raise EngineFailed(f"vLLM ended the answer by itself: finish_reason '{ended}'")
                    finish = _FINISH[ended]
            usage = event.get("usage") or {}
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or cached
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise EngineFailed(
                f"vLLM's answer is not understood ({type(error).__name__}: {error}): {json.dumps(event)[:200]}",
                heals=False,
            ) from error
    if finish is None:
        raise EngineFailed("vLLM's answer ended without a finish_reason")
    yield Piece((), finish=finish, cached=int(cached))


def _tokens(choice: Mapping[str, Any], logprobs: int | None) -> tuple[tuple[int, ...], tuple[TokenLogprob, ...]]:
    """Return the chunk's ids, and their log probabilities if they were asked for."""
    if choice.get("token_ids") is None:
        raise EngineFailed(
            "vLLM sent text without token ids, as versions before 0.10.2 do\n"
            "  update it in its environment: VENV/bin/pip install --upgrade vllm",
            heals=False,
        )
    ids = tuple(int(token) for token in choice["token_ids"])
    if logprobs is None or not ids:
        return ids, ()
    given = choice["logprobs"]
    own, others = given["token_logprobs"], given["top_logprobs"]
    if not len(ids) == len(own) == len(others):
        raise ValueError(f"{len(ids)} tokens and {len(own)} log probabilities")
    return ids, tuple(
        TokenLogprob(token, float(value), _likeliest(top, logprobs))
        for token, value, top in zip(ids, own, others, strict=True)
    )


def _likeliest(top: Mapping[str, float] | None, count: int) -> tuple[tuple[int, float], ...]:
    """Return `count` alternatives, likeliest first. vLLM adds the picked token, where it is not among them."""
    named = {int(name.removeprefix(_MARK)): float(value) for name, value in (top or {}).items()}
    return tuple(sorted(named.items(), key=lambda each: -each[1])[:count])


def message_of(event: Mapping[str, Any]) -> str:
    """Return the message of an error object, in OpenAI's form or in vLLM's older, flat one."""
    error = event.get("error")
    inner = error if isinstance(error, Mapping) else event
    return str(inner.get("message") or error or event)[:2000]
