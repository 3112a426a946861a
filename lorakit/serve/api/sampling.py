"""From a request's fields to the engine's `Sampling`, within the server's limits."""

from __future__ import annotations

from collections.abc import Sequence

from ..engine import Facts, Sampling
from ..errors import TooLong
from ..guard.limits import Limits
from .errors import ApiError
from .requests import Sampled
from .unread import check_offered


def check(request: Sampled, limits: Limits) -> None:
    """Check what does not depend on the model. Raises ApiError."""
    check_offered(request.model_extra)
    if request.n is not None and request.n > limits.answers:
        raise ApiError(f"n is {request.n}; this server gives up to {limits.answers} answers", "n")


def check_conversation(messages: Sequence[object], tools: Sequence[object] | None, limits: Limits) -> None:
    """Raise ApiError for more messages or tools than a request may have."""
    if len(messages) > limits.messages:
        raise ApiError(f"messages: {len(messages)} of them; this server takes up to {limits.messages}", "messages")
    if len(tools or ()) > limits.tools:
        raise ApiError(f"tools: {len(tools or ())}; this server takes up to {limits.tools}", "tools")


def scale(request: Sampled) -> float | None:
    """Return the factor on the adapters that is asked for."""
    return None if request.lorakit is None else request.lorakit.scale


def stop_texts(request: Sampled, limits: Limits) -> tuple[str, ...]:
    """Return the texts that end the answer. Raises ApiError."""
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > limits.stops:
        raise ApiError(f"stop: {len(stops)} texts; this server takes up to {limits.stops}", "stop")
    for text in stops:
        if len(text) > limits.stop_characters:
            longest = limits.stop_characters
            raise ApiError(f"stop: a text of {len(text)} characters; this server takes up to {longest}", "stop")
        if not text:
            raise ApiError("stop: an empty text would end every answer at once; leave it out", "stop")
    return tuple(stops)


def room(prompt: int, asked: int | None, facts: Facts, limits: Limits, default: int | None = None) -> int:
    """Return how many tokens the answer to a prompt may have. Raises TooLong.

    prompt: its tokens. asked: `max_tokens`, which is never cut. default: where it is not given; None: what fits.
    """
    context = facts.context
    if limits.prompt_tokens is not None and prompt > limits.prompt_tokens:
        raise TooLong(f"the prompt has {prompt} tokens; this server takes up to {limits.prompt_tokens}")
    if prompt >= context:
        raise TooLong(f"the prompt has {prompt} tokens; the context holds {context}, answer included")
    most = context - prompt if limits.answer_tokens is None else min(context - prompt, limits.answer_tokens)
    if asked is None:
        return most if default is None else min(default, most)
    if limits.answer_tokens is not None and asked > limits.answer_tokens:
        raise TooLong(f"max_tokens is {asked}; this server gives up to {limits.answer_tokens}")
    if asked > context - prompt:
        raise TooLong(
            f"the prompt has {prompt} tokens and max_tokens is {asked}: {prompt + asked} together; "
            f"the context holds {context}\n  shorten the prompt, or ask for at most {context - prompt} tokens"
        )
    return asked


def logit_bias(request: Sampled, facts: Facts, limits: Limits) -> tuple[tuple[int, float], ...]:
    """Return what is added to which token's logit. Raises ApiError."""
    given = request.logit_bias or {}
    if len(given) > limits.bias:
        raise ApiError(f"logit_bias: {len(given)} entries; this server takes up to {limits.bias}", "logit_bias")
    bias: dict[int, float] = {}
    for text, value in given.items():
        token = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1
        if not 0 <= token < facts.vocabulary:
            expected = f"a token id from 0 to {facts.vocabulary - 1}; /tokenize gives a text's"
            raise ApiError(f"logit_bias: {text[:20]!r} is not {expected}", "logit_bias")
        bias[token] = value
    return tuple(bias.items())


def stop_ids(request: Sampled, facts: Facts, limits: Limits) -> frozenset[int]:
    """Return the tokens that a request lets end its answer. Raises ApiError."""
    given = request.stop_token_ids or ()
    if len(given) > limits.stop_ids:
        raise ApiError(f"stop_token_ids: {len(given)} ids; this server takes up to {limits.stop_ids}", "stop_token_ids")
    for token in given:
        if token >= facts.vocabulary:
            last = facts.vocabulary - 1
            message = f"stop_token_ids: {token} is not a token of the model; its ids end at {last}"
            raise ApiError(message, "stop_token_ids")
    return frozenset(given)


def sampling(
    request: Sampled,
    facts: Facts,
    limits: Limits,
    *,
    max_tokens: int,
    ends: frozenset[int] = frozenset(),
    logprobs: int | None = None,
    schema: str | None = None,
) -> Sampling:
    """Return the sampling of a request. ends: the tokens that end an answer to this prompt. Raises ApiError."""
    if logprobs is not None and logprobs > facts.max_logprobs:
        raise ApiError(f"logprobs: {logprobs} alternatives; the engine reports up to {facts.max_logprobs}", "logprobs")
    ends = frozenset() if request.ignore_eos else ends
    return Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=max(0, request.top_k or 0),
        min_p=request.min_p or 0.0,
        seed=request.seed,
        stop_ids=ends | stop_ids(request, facts, limits),
        logprobs=logprobs,
        logit_bias=logit_bias(request, facts, limits),
        presence=request.presence_penalty or 0.0,
        frequency=request.frequency_penalty or 0.0,
        repetition=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        schema=schema,
    )
