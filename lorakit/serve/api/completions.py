"""/v1/completions: complete a text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fastapi import APIRouter
from starlette.responses import Response
from starlette.types import Send
from typing_extensions import TypeIs

from ..card import Leased
from ..schemas import schema_of
from ..service import Service
from . import sampling
from .answering import Answering
from .answers import Answer, AnswerDelta, collected, deadline, stream, submitted, usage, works
from .errors import ApiError
from .events import Chunks, EventStream, text_json
from .forms import ERRORS, TextChoice, TextCompletion
from .logprobs import TextLogprobWriter
from .replies import adapter_header, fixed, json_bytes, send_json
from .requests import CompletionRequest
from .unread import warning

DEFAULT_TOKENS = 16  # OpenAI's, where max_tokens is not given
OK = {
    "model": TextCompletion,
    "description": "The answers, or a stream of them",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}
CHOICE = b'{"index":%d,"text":%s,"logprobs":%s,"finish_reason":%s}'


def router(service: Service) -> APIRouter:
    """Return the route."""
    routes = APIRouter(tags=["completions"])

    @routes.post("/v1/completions", responses={200: OK, **ERRORS}, response_model=None)
    async def create_completion(request: CompletionRequest) -> Response:
        """Complete a text. A prompt is not put into a chat template."""
        return Answering(partial(_answer, service, request), service.limits.seconds)

    return routes


def _prompts(request: CompletionRequest, service: Service) -> list[str | list[int]]:
    given = request.prompt
    if isinstance(given, str):
        return [given]
    if not given:
        raise ApiError("prompt is an empty list; expected a text, token ids, or a list of either", "prompt")
    prompts: list[str | list[int]] = [given] if _is_ids(given) else list(given)
    answers = len(prompts) * max(request.n or 1, request.best_of or 1)
    most = max(service.limits.waiting, service.limits.answers)
    if answers > most:
        raise ApiError(
            f"prompt: {len(prompts)} prompts make {answers} answers; one request may ask for {most}", "prompt"
        )
    return prompts


def _is_ids(given: list[str] | list[int] | list[list[int]]) -> TypeIs[list[int]]:
    return isinstance(given[0], int)


def _check(request: CompletionRequest, service: Service) -> None:
    sampling.check(request, service.limits)
    if request.suffix:
        raise ApiError("suffix: text is not filled in before another; leave it out", "suffix", "unsupported")
    if request.echo and request.logprobs is not None:
        raise ApiError("echo: log probabilities are given for the answer, not for the prompt", "echo", "unsupported")
    n, best_of = request.n or 1, request.best_of
    if best_of is not None:
        if best_of < n:
            raise ApiError(f"best_of is {best_of}, fewer than the {n} answers asked for (n)", "best_of")
        if best_of > service.limits.answers:
            most = service.limits.answers
            raise ApiError(f"best_of is {best_of}; this server computes up to {most} answers", "best_of")
        if request.stream and best_of > n:
            raise ApiError("best_of: which answers are best is known at their end; do not stream them", "best_of")


async def _answer(service: Service, request: CompletionRequest, send: Send) -> None:
    _check(request, service)
    until = deadline(service)
    texts = _prompts(request, service)
    stops = sampling.stop_texts(request, service.limits)
    schema = schema_of(request.response_format, service.limits.schema)
    count = max(request.n or 1, request.best_of or 1)
    ranked = count > (request.n or 1)
    async with service.registry.lease(request.model, sampling.scale(request)) as leased:
        prompts = [await service.renderer.text(text, leased.leading) for text in texts]
        everything = []
        for prompt in prompts:
            length = len(prompt.ids)
            how = sampling.sampling(
                request,
                service.facts,
                service.limits,
                max_tokens=sampling.room(length, request.max_tokens, service.facts, service.limits, DEFAULT_TOKENS),
                ends=prompt.stop_ids,
                logprobs=0 if ranked and request.logprobs is None else request.logprobs,
                schema=schema,
            )
            everything += works(prompt.ids, leased.choice, how, count, until)
        decode = service.renderer.texts.decode
        before = [text if isinstance(text, str) else decode(text) for text in texts] if request.echo else []
        with submitted(service, everything) as tickets:
            answers = [
                Answer(at, ticket, service.renderer.answer(prompts[at // count], stops))
                for at, ticket in enumerate(tickets)
            ]
            echoes = [before[at // count] if before else "" for at in range(len(answers))]
            reply = _Reply(service, request, leased, answers, echoes, sum(len(prompt.ids) for prompt in prompts))
            await (reply.stream(send) if request.stream else reply.whole(send))


class _Reply:
    """The answers in OpenAI's forms. answers: those to the first prompt, then those to the second, and so on.

    echoes: the text that is put before each answer, "" for none. Both are looked up by `Answer.index`.
    """

    def __init__(
        self,
        service: Service,
        request: CompletionRequest,
        leased: Leased,
        answers: Sequence[Answer],
        echoes: Sequence[str],
        prompt_tokens: int,
    ):
        self.request, self.answers, self.echoes, self.prompt_tokens = request, answers, echoes, prompt_tokens
        self.fixed = fixed("text_completion", "cmpl", leased, service)
        self.headers = adapter_header(leased) | warning(request)
        self.writers = [TextLogprobWriter(service.renderer.texts) for _ in answers]

    def _choice(self, answer: Answer, text: str, came: Sequence[AnswerDelta], index: int) -> TextChoice:
        tokens = [token for delta in came for token in delta.logprobs]
        reason = came[-1].reason
        assert reason == "stop" or reason == "length"
        return {
            "index": index,
            "text": text,
            "logprobs": None if self.request.logprobs is None else self.writers[answer.index].write(tokens),
            "finish_reason": reason,
        }

    async def whole(self, send: Send) -> None:
        came = await collected(self.answers)
        choices = []
        for at, answer in enumerate(self._best()):
            deltas = came[answer.index]
            text = self.echoes[answer.index] + "".join(delta.text for delta in deltas)
            choices.append(self._choice(answer, text, deltas, at))
        counts = usage(self.prompt_tokens, self.answers)
        await send_json(send, {**self.fixed, "choices": choices, "usage": counts}, self.headers)

    def _best(self) -> list[Answer]:
        """Return the n answers to each prompt with the highest log probability per token, best first."""
        n, count = self.request.n or 1, max(self.request.n or 1, self.request.best_of or 1)
        if n == count:
            return list(self.answers)
        groups = [self.answers[at : at + count] for at in range(0, len(self.answers), count)]
        best = [sorted(group, key=lambda answer: -answer.logprob / max(answer.tokens, 1))[:n] for group in groups]
        return [answer for group in best for answer in group]

    async def stream(self, send: Send) -> None:
        options = self.request.stream_options
        chunks = Chunks(self.fixed, bool(options and options.include_usage))
        echoes = {at: text for at, text in enumerate(self.echoes) if text}  # those that are not sent yet

        def event(answer: Answer, delta: AnswerDelta) -> bytes:
            text = echoes.pop(answer.index, "") + delta.text
            logprobs = b"null"
            if delta.logprobs and self.request.logprobs is not None:
                logprobs = json_bytes(self.writers[answer.index].write(delta.logprobs))
            reason = text_json(delta.reason) if delta.reason else b"null"
            return chunks.of(CHOICE % (answer.index, text_json(text), logprobs, reason))

        await stream(self.answers, EventStream(send, self.headers), chunks, event, self.prompt_tokens)
