"""The bounds on what one request may ask for, and on how many may be open."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What is beyond a bound is refused with an error that names the bound; `waiting` with 429 and Retry-After."""

    body: int = 1_000_000  # bytes of a request
    nesting: int = 32  # levels of its JSON
    messages: int = 1_000
    answers: int = 8  # `n`
    stops: int = 16
    stop_characters: int = 256  # of one stop text
    stop_ids: int = 128  # entries of `stop_token_ids`
    bias: int = 1_024  # entries of `logit_bias`
    tools: int = 128
    schema: int = 65_536  # characters of a JSON schema
    prompt_tokens: int | None = None  # None: what the context holds
    answer_tokens: int | None = None  # the most `max_tokens`; None: what the context holds
    waiting: int = 256  # requests waiting for a slot
    seconds: float = 600.0  # of one request, waiting included
